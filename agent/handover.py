"""How a guest goes from one host to another, as the source's migd arranges it.

Offer, accept, connect, start, follow: the same for a first move, for a hop, and for whatever else ends
with a keeper at the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import msgspec

from agent import peer_messages
from agent.agents import Agent
from agent.link import MAX_PACKET, Departed, Failed, Offer, Packet, Progress, StartDeparture
from agent.peer_pool import REFILL_SECONDS
from agent.peers import ConnectionCut, RawConnection
from agent.this_host import ThisHost
from migrate import messages
from migrate.config import Host
from migrate.errors import HostError, PeerError, UserError

log = logging.getLogger(__name__)

MAX_OFFER_BYTES = MAX_PACKET // 2
"""leaves room for the rest of the packet that hands it on"""

Tell = Callable[[messages.Progress], Awaitable[None]]
"""passes progress on to whoever asked for the move"""


@dataclass(frozen=True)
class Handover:
    """An accepted offer: the destination's keeper waits at the other end of the connections."""

    host: Host
    boot_id: str
    """of the destination"""
    connections: tuple[RawConnection, ...]

    async def drive(self, agent: Agent, order: StartDeparture, tell: Tell) -> Departed:
        """Give the connections to a guard or keeper with its order, and follow it to the end.

        :raises MigrateError: it did not move, or is in doubt.
        """
        queue: asyncio.Queue[Packet | None] = asyncio.Queue()
        agent.waiting.append(queue)
        try:
            fds = tuple(fd for c in self.connections for fd in (c.fd_in, c.fd_out))
            if not agent.link.send(order, fds):
                raise HostError(agent.role, "was killed; the process runs on here", "try again")
            for connection in self.connections:
                connection.detach()
            return await _follow(queue, order.offer.transaction, tell)
        finally:
            agent.waiting.remove(queue)


@contextlib.asynccontextmanager
async def handover(
    here: ThisHost,
    offer: Offer,
    host: Host,
    purposes: tuple[str, ...],
    refill_seconds: float = REFILL_SECONDS,
) -> AsyncIterator[Handover]:
    """Offer a guest to a host. Inside, it is accepted; connections that nobody drove are closed after.

    :param purposes: of the connections with the destination's keeper, in this order.
    :param refill_seconds: as RawPool.take.
    :raises MigrateError: the host refuses, or cannot be reached.
    """
    if len(msgspec.msgpack.encode(offer)) > MAX_OFFER_BYTES:
        reason = "works in too many directories"
        raise UserError(f"pid {offer.ids.pid}", reason, "move it before it opens so many")
    opening = [asyncio.create_task(here.peers.raw.take(host, refill_seconds)) for _ in purposes]
    connections: list[RawConnection] = []
    try:
        answer = await _make_offer(here, offer, host)
        for task in opening:
            connections.append(await here.peers.raw.trusted(await task))
        for connection, purpose in zip(connections, purposes, strict=True):
            connection.begin(purpose, offer.guest)
        yield Handover(host, answer.boot_id, tuple(connections))
    finally:
        for connection in connections:
            connection.close()
        for task in opening:
            if not task.done():
                task.cancel()
            elif not task.cancelled() and task.exception() is None:
                task.result().close()


async def _make_offer(here: ThisHost, offer: Offer, host: Host) -> peer_messages.Accepted:
    question = peer_messages.MakeOffer(offer)
    try:
        return await here.ask(host, question, peer_messages.Accepted)
    except ConnectionCut:
        # The host has restarted since it was last heard of. The same offer made twice is one.
        return await here.ask(host, question, peer_messages.Accepted)


@contextlib.asynccontextmanager
async def early_guard(here: ThisHost, guest: str) -> AsyncIterator[Callable[[], Awaitable[Agent]]]:
    """Start a guard while the destination judges the offer. Who takes it gives it an order."""

    async def start() -> Agent:
        return here.agents.start("guard", guest, None)

    starting = asyncio.create_task(start())
    taken = False

    def take() -> Awaitable[Agent]:
        nonlocal taken
        taken = True
        return starting

    try:
        yield take
    finally:
        if not taken:
            here.agents.dismiss(await starting)


async def _follow(queue: asyncio.Queue[Packet | None], transaction: str, tell: Tell) -> Departed:
    """:raises MigrateError: this move has failed. A hop of before a restart of migd may end meanwhile."""
    while True:
        match await queue.get():
            case Progress(step, sent_bytes, at_ms):
                await tell(messages.Progress(step, sent_bytes, at_ms))
            case Departed() as departed if departed.transaction == transaction:
                log.info(
                    "%s: moved to %s, frozen %.0f ms, %d bytes",
                    departed.transaction,
                    departed.destination,
                    departed.frozen_ms,
                    departed.sent_bytes,
                )
                return departed
            case Failed(in_doubt=True) as failed if failed.transaction == transaction:
                # No PeerError: it may run there, so no other host may be tried instead.
                raise HostError(failed.what, failed.reason, failed.remedy)
            case Failed() as failed if failed.transaction == transaction:
                raise PeerError(failed.what, failed.reason, failed.remedy)
            case None:
                raise HostError("guard", "was killed; the process runs on here", "try again")


async def tell_nobody(progress: messages.Progress) -> None:
    """For moves that no client waits for, and for hops: the guard hears of those from its keeper."""
