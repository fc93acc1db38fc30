"""migd's part in `migrate COMMAND`: find a host, have it make a capsule, and start the guard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import secrets
from pathlib import Path

import msgspec

from agent.command_server import Client, reply
from agent.handover import early_guard, handover
from agent.home_paths import Used, system_files, view_directories
from agent.link import Offer, OfferedTerminal, Owner, StartCommand, TreeIds
from agent.peers import AnswerLost
from agent.programs import programs_here
from agent.selection import choose
from agent.this_host import ThisHost
from criu_hooks.proc import ProcDir, Stat, parse_stat, parse_status
from criu_hooks.tree import pts_index
from migrate.command_wire import Reply, Request
from migrate.config import Config, Host
from migrate.errors import MigrateError, PeerError, UserError
from migrate.mig_messages import Priority

log = logging.getLogger(__name__)

REFILL_SECONDS = 0.25
"""Nobody stands still for a command, and one often follows another."""

SECOND_CHANCE_SECONDS = 3.0


async def run_command(here: ThisHost, request: Request, client: Client) -> None:
    """Find a host and hand the client to a guard.

    :raises MigrateError: nothing was begun.
    """
    config = here.config
    named = _named_host(config, request)
    if named is not None:
        if named.name == config.name:
            reply(client.socket, Reply("here", named.name))
            return
        await _begin_there(here, named, request, client)
        return
    refused: list[PeerError] = []
    excluded: set[str] = set()
    while True:
        async with choose(here, client.uid, excluded, refused, _priority(request)) as choice:
            try:
                await _begin(here, choice.host, request, client, chosen=True)
            except PeerError as error:
                # A refused offer is the next host's chance.
                refused.append(error)
                excluded.add(choice.host.name)
                continue
            choice.keep()
            return


def _priority(request: Request) -> Priority:
    return Priority.LOW if request.low else Priority.NORMAL


def _named_host(config: Config, request: Request) -> Host | None:
    if request.host:
        return config.host_named(request.host)
    return config.host_with_id(request.host_id) if request.host_id else None


async def _begin_there(here: ThisHost, host: Host, request: Request, client: Client) -> None:
    try:
        await _begin(here, host, request, client)
    except AnswerLost as error:
        # The control connection was dead without our knowing: once more over a fresh one, as
        # another guest, since the first offer may have arrived; that one ends by itself.
        log.info("%s; once more", error)
        try:
            async with asyncio.timeout(SECOND_CHANCE_SECONDS):
                await here.peers.control(host).hello()
        except (MigrateError, TimeoutError):
            raise error from None
        await _begin(here, host, request, client)


async def _begin(
    here: ThisHost,
    host: Host,
    request: Request,
    client: Client,
    *,
    chosen: bool = False,
) -> None:
    offer, stat = await asyncio.to_thread(_make_offer, here, request, client)
    offer = msgspec.structs.replace(offer, chosen=chosen)
    async with (
        early_guard(here, offer.guest) as early,
        handover(here, offer, host, ("lifeline",), REFILL_SECONDS) as accepted,
    ):
        reply(client.socket, Reply("progress", f"{host.name} has accepted"))
        start = StartCommand(offer, host.name, accepted.boot_id, stat.starttime_ticks, request.low)
        guard = await early()
        (lifeline,) = accepted.connections
        fds = (lifeline.fd_in, lifeline.fd_out, client.socket.fileno(), *client.fds)
        if guard.link.send(start, fds):
            lifeline.detach()


def _make_offer(here: ThisHost, request: Request, client: Client) -> tuple[Offer, Stat]:
    if client.pid == 0:
        raise UserError("migrate", "runs in another pid namespace", "run it on the host itself")
    try:
        with ProcDir(client.pid) as proc:
            stat = parse_stat(proc.read("stat"))
            credentials = parse_status(proc.read("status")).credentials
            cwd = proc.link("cwd")
    except OSError:
        raise UserError(f"pid {client.pid}", "has ended") from None
    uid = credentials.uids.real
    if not (credentials.uids.same and credentials.gids.same) or uid != client.uid:
        raise UserError(f"pid {client.pid}", "has more than one uid or gid")
    if cwd.endswith(" (deleted)"):
        raise UserError("working directory", "does not exist any more", "cd to another")
    if any("\ud800" <= letter <= "\udfff" for letter in cwd):
        raise UserError("working directory", "its name is not in UTF-8", "cd to another")
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise UserError(f"uid {uid}", "has no account on this host") from None
    owner = Owner(name, uid, credentials.gids.real, tuple(credentials.groups))
    used = [Used.by_process(client.pid, cwd)]
    view = view_directories(used, owner, here.config.shared_paths)
    return Offer(
        transaction=secrets.token_hex(6),
        guest=f"{client.pid}-{secrets.token_hex(6)}",
        home=here.name,
        source=here.name,
        owner=owner,
        ids=TreeIds(client.pid, stat.ppid, stat.pgid, stat.sid),
        epoch=1,
        memory_bytes=0,
        machine=os.uname().machine,
        cpu_features=(),
        criu_version=here.criu_version,
        hostname=os.uname().nodename,
        view=view,
        command=request.title,
        freeze_limit_seconds=here.config.freeze_limit_seconds,
        cut_freeze_seconds=here.config.cut_freeze_seconds,
        home_boot_id=here.boot_id,
        is_command=True,
        priority=_priority(request),
        programs=programs_here(),
        terminal=_terminal_of(client.pid, stat),
        files=system_files(used, view),
    ), stat


def _terminal_of(pid: int, stat: Stat) -> OfferedTerminal | None:
    """The client's controlling terminal, if its name means the same to us."""
    index = pts_index(stat.tty_nr)
    if index is None or not _in_our_files(pid):
        return None
    return OfferedTerminal(index, controlling=True)


def _in_our_files(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/mnt").stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino
    return False
