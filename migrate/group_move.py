"""Moves all processes of a group: several trees at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from migrate import client, messages
from migrate import group_messages as words
from migrate.errors import MigrateError, UserError
from migrate.group_asking import ask

AT_ONCE = 4
"""trees that move at the same time; a host has spare connections for as many"""


@dataclass(frozen=True)
class Outcome:
    """What became of members that move as one."""

    pids: tuple[int, ...]
    host: str = ""
    """where they run now; empty: they did not move"""
    moved: messages.Moved | None = None
    """None: they did not move, or were there already"""
    failures: tuple[MigrateError, ...] = ()


def move_group(
    group: int, host: str = "", host_id: int = 0, *, check: bool = False
) -> Iterator[Outcome]:
    """Move a group; first come the members that cannot move, all before anything moves.

    :param host: where to, by name; empty, and no `host_id`: to hosts that the load database chooses.
    :param check: only tell what is in the way.
    :raises MigrateError: nothing is moved at all.
    """
    plan = ask(words.PlanGroup(group, host, host_id))
    assert isinstance(plan, words.GroupPlan)
    if not plan.trees and not plan.stuck:
        raise UserError(f"group {group}", "has no members", "see `joingroup --help`")
    for stuck in plan.stuck:
        failures = tuple(UserError(one.what, one.reason, one.remedy) for one in stuck.reasons)
        yield Outcome(stuck.pids, failures=failures)

    def one(tree: words.GroupTree) -> Outcome:
        if tree.there or check:
            return Outcome(tree.pids, host or str(host_id))
        return _move(tree, messages.Move(tree.pid, host, host_id))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(one, plan.trees)


def _move(tree: words.GroupTree, request: messages.Move) -> Outcome:
    try:
        *_, reply = client.ask(request)
    except MigrateError as error:
        return Outcome(tree.pids, failures=(error,))
    if isinstance(reply, messages.Moved):
        return Outcome(tree.pids, reply.host, reply)
    assert isinstance(reply, messages.Refused)
    failures = tuple(UserError(o.what, o.reason, o.remedy) for o in reply.obstacles)
    return Outcome(tree.pids, failures=failures)


def move_for_migrate(
    group: int, host: str, host_id: int, *, check: bool, tell: bool
) -> Iterator[str]:
    """`migrate -p @GROUP`: yields what stderr is to say of members that did not move.

    :param tell: whether stdout says what was done.
    """
    from migrate.pids import format_pid

    for outcome in move_group(group, host, host_id, check=check):
        yield from (str(failure) for failure in outcome.failures)
        if outcome.failures:
            continue
        for pid in outcome.pids:
            if check:
                print(f"{format_pid(pid)} can move")
            elif tell and outcome.moved is None:
                print(f"{format_pid(pid)} is on {outcome.host} already")
            elif tell and outcome.moved is not None:
                mebibytes = outcome.moved.sent_bytes / (1 << 20)
                print(
                    f"{format_pid(pid)} → {outcome.host}  "
                    f"(frozen {outcome.moved.frozen_ms:.0f} ms, {mebibytes:.0f} MiB)"
                )
