"""What `migctl ps` and `migctl log` show, and `migctl recover`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.journal import Entry, Side, State
from agent.settling import Settling
from agent.this_host import OFFER_SECONDS, ThisHost
from criu_hooks.proc import pid_starttime
from migrate import messages
from migrate.errors import MigrateError

HISTORY_LIMIT = 1000


def list_guests(here: ThisHost, caller_uid: int, evicted: Callable[[str], str]) -> messages.Guests:
    """What is away or a guest here: to root everything, to others what is theirs.

    :param evicted: guest → why it is to leave this host; "" if it is not.
    """
    rows = []
    for entry in here.journal.in_state(State.BEGUN, State.COMMITTED, State.OFFERED, State.RESUMED):
        if caller_uid not in (0, entry.uid) or entry.boot_id != here.boot_id:
            continue
        if entry.side is Side.SOURCE and not entry.origin_cgroup:
            continue  # a hop: its home lists it
        if entry.side is Side.DESTINATION and entry.home == here.name:
            continue  # home again: the row of its first migration says so
        where = entry.peer if entry.side is Side.SOURCE else here.name
        state = {
            State.BEGUN: "leaving",
            State.COMMITTED: "in doubt",
            State.OFFERED: "arriving",
            State.RESUMED: _whereabouts(here, entry),
        }[entry.state]
        reason = evicted(entry.guest) if where == here.name else ""
        rows.append(
            messages.GuestRow(
                entry.pid,
                entry.user,
                entry.home,
                where,
                entry.since,
                f"evicted: {reason}" if reason else state,
                entry.command,
                entry.priority,
            )
        )
    return messages.Guests(tuple(rows))


def _whereabouts(here: ThisHost, entry: Entry) -> str:
    if entry.side is Side.DESTINATION:
        return "guest"
    if entry.state is State.RESUMED and not _stands(entry):
        return "rest"
    return "home" if entry.peer == here.name else "away"


def _stands(entry: Entry) -> bool:
    """Whether its deputy is still there: else only background processes are left of the guest."""
    try:
        return pid_starttime(entry.pid) == entry.starttime_ticks
    except (OSError, MigrateError):
        return False


def history(here: ThisHost, caller_uid: int, count: int) -> messages.History:
    """The last migrations from and to this host: to root all, to others theirs."""
    rows = [
        messages.HistoryRow(
            since=entry.since,
            state=entry.state,
            outgoing=entry.side is Side.SOURCE,
            peer=entry.peer,
            pid=entry.pid,
            user=entry.user,
            home=entry.home,
            reason=entry.reason,
            command=entry.command,
        )
        for entry in here.journal.latest(HISTORY_LIMIT)
        if caller_uid in (0, entry.uid)
    ]
    return messages.History(tuple(rows[-count:]))


async def recover(
    here: ThisHost, settling: Settling, request: messages.Recover
) -> messages.Recovered:
    """Settle transactions in doubt, and say how."""
    lines = []
    for entry in here.journal.in_state(State.COMMITTED):
        if entry.side is not Side.SOURCE:
            continue
        if entry.peer == request.lost_host:
            settling.conclude(entry, resumed=False)
            lines.append(f"{entry.transaction}: pid {entry.pid} runs here again")
            continue
        try:
            async with asyncio.timeout(OFFER_SECONDS):
                await settling.settle(entry)
            lines.append(f"{entry.transaction}: pid {entry.pid} settled with {entry.peer}")
        except TimeoutError:
            lines.append(
                f"{entry.transaction}: pid {entry.pid} waits for {entry.peer}, which does not answer;"
                f" if it will never come back: migctl recover --lost {entry.peer}"
            )
    return messages.Recovered(tuple(lines))
