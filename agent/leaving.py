"""First moves: a process of this host leaves home."""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import secrets

import msgspec

from agent.group_travel import taken_along
from agent.handover import Tell, early_guard, handover
from agent.home_paths import system_files, used_by, view_directories
from agent.hosting import cpu_features
from agent.link import Departed, Offer, OfferedTerminal, Owner, StartDeparture, TreeIds
from agent.peers import AnswerLost
from agent.programs import programs_here
from agent.selection import choose, named_host
from agent.this_host import ThisHost
from criu_hooks.tree import ProcessTree
from migrate import messages
from migrate.config import Host
from migrate.errors import MigrateError, PeerError, UserError

log = logging.getLogger(__name__)

SECOND_CHANCE_SECONDS = 3.0


async def leave(here: ThisHost, request: messages.Move, tree: ProcessTree, tell: Tell) -> Departed:
    """Move a tree that preflight has passed, to the host that its user names or to one that takes it.

    :raises MigrateError: it runs on here, or is in doubt.
    """
    named = named_host(here.config, request, here.name)
    if named is not None:
        return await _leave_for(here, tree, named, tell)
    refused: list[PeerError] = []
    excluded: set[str] = set()
    while True:
        async with choose(here, tree.root.credentials.uids.real, excluded, refused) as choice:
            try:
                departed = await _depart(here, tree, choice.host, tell, chosen=True)
            except PeerError as error:
                # A refused offer is the next host's chance.
                refused.append(error)
                excluded.add(choice.host.name)
                continue
            choice.keep()
            return departed


async def _leave_for(here: ThisHost, tree: ProcessTree, host: Host, tell: Tell) -> Departed:
    try:
        return await _depart(here, tree, host, tell)
    except AnswerLost as error:
        # The control connection was dead without our knowing. Once more if a fresh one
        # can be had at once; an offer that did arrive ends by itself.
        log.info("%s; once more", error)
        try:
            async with asyncio.timeout(SECOND_CHANCE_SECONDS):
                await here.peers.control(host).hello()
        except (MigrateError, TimeoutError):
            raise error from None
        return await _depart(here, tree, host, tell)


async def _depart(
    here: ThisHost, tree: ProcessTree, host: Host, tell: Tell, *, chosen: bool = False
) -> Departed:
    offer = await asyncio.to_thread(make_offer, here, tree)
    offer = msgspec.structs.replace(offer, chosen=chosen, groups=taken_along(here, tree))
    async with (
        early_guard(here, offer.guest) as guard,
        handover(here, offer, host, ("bulk", "lifeline")) as accepted,
    ):
        order = StartDeparture(
            offer=offer,
            destination=host.name,
            destination_boot_id=accepted.boot_id,
            starttime_ticks=tree.root.starttime_ticks,
            host_pid=tree.root.pid,
            ghost_limit_bytes=here.config.ghost_limit_bytes,
        )
        return await accepted.drive(await guard(), order, tell)


def make_offer(here: ThisHost, tree: ProcessTree) -> Offer:
    """What a destination is told of a tree of this host. Not for the loop: it looks at many files.

    :raises UserError: its owner has no account.
    """
    root = tree.root
    credentials = root.credentials
    uid = credentials.uids.real
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise UserError(f"uid {uid}", "has no account on this host") from None
    owner = Owner(name, uid, credentials.gids.real, tuple(credentials.groups))
    used = used_by(tree)
    view = view_directories(used, owner, here.config.shared_paths)
    return Offer(
        transaction=secrets.token_hex(6),
        guest=f"{root.pid}-{secrets.token_hex(6)}",
        home=here.name,
        source=here.name,
        owner=owner,
        ids=TreeIds(root.pid, root.ppid, root.pgid, root.sid),
        epoch=1,
        memory_bytes=sum(p.status.dump_bytes for p in tree.members),
        machine=os.uname().machine,
        cpu_features=cpu_features(),
        criu_version=here.criu_version,
        hostname=os.uname().nodename,
        view=view,
        command=" ".join(root.private.cmdline)[:200],
        freeze_limit_seconds=here.config.freeze_limit_seconds,
        cut_freeze_seconds=here.config.cut_freeze_seconds,
        home_boot_id=here.boot_id,
        programs=programs_here(),
        files=system_files(used, view),
        terminal=_terminal_of(tree),
    )


def _terminal_of(tree: ProcessTree) -> OfferedTerminal | None:
    index = tree.terminal_index
    if index is None:
        return None
    return OfferedTerminal(index, controlling=bool(tree.root.tty_nr))
