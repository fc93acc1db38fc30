"""Hops: a guest goes on from the host where it runs to another, or home. Its home or its host may ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import msgspec

from agent import peer_messages
from agent.agents import Agent
from agent.group_travel import settle, taken_along
from agent.guest_lines import connect_next
from agent.handover import Tell, handover, tell_nobody
from agent.home_paths import system_files, used_by
from agent.hosting import cpu_features
from agent.inspection import inspect_guest
from agent.journal import Entry, Side, State
from agent.link import Offer, Packet, Progress, StartDeparture
from agent.peers import AnswerLost
from agent.selection import choose, named_host
from agent.this_host import ThisHost, guest_gone, in_doubt
from migrate import messages
from migrate.config import Host
from migrate.errors import HostError, PeerError, UserError

HOP_SECONDS = 3600.0


async def move_on(
    here: ThisHost, request: messages.Move, entry: Entry, caller_uid: int, tell: Tell
) -> messages.Reply:
    """Move a guest whose home is here, for a client.

    :param entry: its first migration.
    :raises MigrateError: it runs on where it was, or is in doubt.
    """
    if caller_uid not in (0, entry.uid):
        raise UserError(
            f"pid {entry.pid}", f"belongs to {entry.user}", "only its owner or root moves it"
        )
    guard = here.agents.find("guard", entry.guest)
    if guard is None:
        raise HostError(f"pid {entry.pid}", "its guard was killed", "it can only be ended")
    if request.check_only:
        return messages.Checked(entry.pid)
    host = named_host(here.config, request, entry.peer)
    async with _progress(guard, tell):
        if host is None:
            return await _move_to_idle(here, entry)
        return await _move_to(here, entry, host)


async def move_guest(
    here: ThisHost, request: messages.Move, offer: Offer, caller_uid: int, tell: Tell
) -> messages.Reply:
    """Move a guest that runs here, for a client of this host.

    :param offer: by which it came.
    :raises MigrateError: it runs on here, or is in doubt.
    """
    deputy = here.journal.deputy(offer.ids.pid) if offer.home == here.name else None
    if deputy is not None and deputy.guest == offer.guest:
        return await move_on(here, request, deputy, caller_uid, tell)
    if caller_uid not in (0, offer.owner.uid):
        raise UserError(
            f"pid {request.pid}",
            f"belongs to {offer.owner.name}",
            "only its owner or root moves it",
        )
    if request.check_only:
        return messages.Checked(request.pid)
    host = named_host(here.config, request, here.name)
    if host is None:
        raise UserError(f"pid {request.pid}", "is a guest here", "name a host, or ask at its home")
    moved = await hop(here, offer.guest, host, tell)
    return messages.Moved(request.pid, host.name, moved.frozen_ms, moved.sent_bytes)


@contextlib.asynccontextmanager
async def _progress(guard: Agent, tell: Tell) -> AsyncIterator[None]:
    """Inside, progress goes to `tell`: wherever the guest is, its keeper tells its guard."""
    queue: asyncio.Queue[Packet | None] = asyncio.Queue()

    async def pass_on() -> None:
        while (packet := await queue.get()) is not None:
            if isinstance(packet, Progress):
                await tell(messages.Progress(packet.step, packet.sent_bytes, packet.at_ms))

    guard.waiting.append(queue)
    task = asyncio.create_task(pass_on())
    try:
        yield
    finally:
        guard.waiting.remove(queue)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _move_to_idle(here: ThisHost, entry: Entry) -> messages.Moved:
    """To the host that the load database chooses, or the next if that refuses."""
    refused: list[PeerError] = []
    excluded = {entry.peer}
    while True:
        async with choose(here, entry.uid, excluded, refused) as choice:
            try:
                moved = await _move_to(here, entry, choice.host, chosen=True)
            except AnswerLost:
                raise
            except PeerError as error:
                refused.append(error)
                excluded.add(choice.host.name)
                continue
            choice.keep()
            return moved


async def _move_to(
    here: ThisHost, entry: Entry, host: Host, *, chosen: bool = False
) -> messages.Moved:
    if entry.peer == here.name:
        moved = await hop(here, entry.guest, host, tell_nobody, chosen=chosen)
    else:
        moved = await here.ask(
            entry.peer,
            peer_messages.MoveGuest(entry.guest, host.name, chosen),
            peer_messages.GuestMoved,
            HOP_SECONDS,
        )
    here.journal.relocate(entry.transaction, host.name, "")
    return messages.Moved(entry.pid, host.name, moved.frozen_ms, moved.sent_bytes)


async def hop(
    here: ThisHost,
    guest: str,
    host: Host,
    tell: Tell,
    *,
    chosen: bool = False,
    reason: str = "",
) -> peer_messages.GuestMoved:
    """Send a guest of this host on to another, or home. One hop of a guest waits for the other.

    :param chosen: the load database chose that host: nobody named it.
    :param reason: why, if nobody asked for this move.

    :raises MigrateError: it runs on here, or is in doubt.
    """
    keeper = here.agents.find("keeper", guest)
    if keeper is None:
        raise guest_gone(guest)
    async with keeper.moving:
        return await _hop(here, guest, host, tell, chosen, reason)


async def _hop(
    here: ThisHost, guest: str, host: Host, tell: Tell, chosen: bool, reason: str
) -> peer_messages.GuestMoved:
    keeper = here.agents.find("keeper", guest)
    if keeper is None or keeper.offer is None:
        raise guest_gone(guest)
    if host.name == here.name:
        raise UserError(f"guest {guest}", f"runs on {here.name} already")
    for entry in here.journal.in_state(State.COMMITTED):
        if entry.guest == guest and entry.side is Side.SOURCE:
            # Home connects with one host more than the guest may be on, not with two.
            raise in_doubt(entry)
    tree = await asyncio.to_thread(inspect_guest, keeper.offer, here.config, held=bool(reason))
    settle(here, [keeper.offer])
    offer = msgspec.structs.replace(
        keeper.offer,
        transaction=secrets.token_hex(6),
        source=here.name,
        epoch=keeper.offer.epoch + 1,
        memory_bytes=sum(p.status.dump_bytes for p in tree.members),
        cpu_features=cpu_features(),
        is_command=False,
        chosen=chosen,
        reason=reason,
        groups=taken_along(here, tree),
        files=await asyncio.to_thread(system_files, used_by(tree), keeper.offer.view),
    )
    async with handover(here, offer, host, ("bulk",)) as accepted:
        await _have_home_connect(here, offer, host)
        order = StartDeparture(
            offer=offer,
            destination=host.name,
            destination_boot_id=accepted.boot_id,
            starttime_ticks=0,
            host_pid=offer.ids.pid,
            ghost_limit_bytes=here.config.ghost_limit_bytes,
        )
        departed = await accepted.drive(keeper, order, tell)
    return peer_messages.GuestMoved(departed.frozen_ms, departed.sent_bytes)


async def _have_home_connect(here: ThisHost, offer: Offer, host: Host) -> None:
    if offer.home == here.name:
        await connect_next(here, offer.guest, host.name)
        return
    question = peer_messages.ConnectGuest(offer.guest, host.name)
    await here.ask(offer.home, question, peer_messages.Connected)
