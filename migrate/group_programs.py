"""openMosix's miggroup programs: `joingroup`, `showgroup`, `migrategroup`, `resetgroup`.

What they print on stdout is what its manual shows. Exit status: 1 if some process did not do what
was wanted, which stderr tells; 125 if nothing was done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from migrate import group_messages as words
from migrate.errors import MigrateError, UserError
from migrate.group_asking import ask, members, one_line, parse_group, parse_host
from migrate.pids import parse_pid

SOME_FAILED = 1
OWN_FAILURE = 125

_HELP = {
    "joingroup": (
        "joingroup PID... GROUP",
        "Let processes join a group: a number, 1 to 2147483647; 0: they leave theirs.",
    ),
    "showgroup": ("showgroup [--json] GROUP", "Show the processes of a group."),
    "migrategroup": (
        "migrategroup GROUP HOST-OR-ID",
        "Move the processes of a group to a host, several at a time.",
    ),
    "resetgroup": ("resetgroup GROUP", "Let the processes of a group leave it."),
}


def _change(request: words.JoinGroup | words.ResetGroup) -> words.Joined:
    reply = ask(request)
    assert isinstance(reply, words.Joined)
    return reply


# ---------------------------------------------------------------------- the programs


def _join(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        _misused("joingroup")
    pids = tuple(parse_pid(word) for word in arguments[:-1])
    group = parse_group(arguments[-1], least=0)
    joined = _change(words.JoinGroup(pids, group))
    print("miggroup =", group)
    print("processes =", *pids)
    for pid in joined.pids:
        print(f"process {pid} joins the miggroup {group} now")
    return _complain("joingroup", joined)


def _show(arguments: Sequence[str]) -> int:
    wanted = [word for word in arguments if word != "--json"]
    if len(wanted) != 1:
        _misused("showgroup")
    group = parse_group(wanted[0])
    if "--json" not in arguments:
        for row in members(group):
            print(f"{row.pid} with commandline {one_line(row.command)} belongs to {group}")
        return 0
    rows = [
        {
            "pid": row.pid,
            "command": row.command,
            "user": row.user,
            "home": row.home,
            "where": row.where,
        }
        for row in members(group)
    ]
    print(json.dumps({"group": group, "processes": rows}))
    return 0


def _migrate(arguments: Sequence[str]) -> int:
    from migrate.group_move import move_group

    if len(arguments) != 2:
        _misused("migrategroup")
    group, where = parse_group(arguments[0]), arguments[1]
    status = 0
    for outcome in move_group(group, *parse_host(where)):
        for failure in outcome.failures:
            status = SOME_FAILED
            pids = " ".join(map(str, outcome.pids))
            print(f"migrategroup: {pids} not migrated to {where}: {failure}", file=sys.stderr)
        if not outcome.failures:
            for pid in outcome.pids:
                already = outcome.moved is None
                print(f"{pid} is on {where} already" if already else f"migrate {pid} to {where}")
        sys.stdout.flush()
    return status


def _reset(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        _misused("resetgroup")
    joined = _change(words.ResetGroup(parse_group(arguments[0])))
    for pid in joined.pids:
        print(f"resetet {pid}")
    return _complain("resetgroup", joined)


def _complain(program: str, joined: words.Joined) -> int:
    for one in joined.unjoined:
        error = UserError(f"pid {one.pid}", one.reason, one.remedy)
        print(f"{program}: {error}", file=sys.stderr)
    return SOME_FAILED if joined.unjoined else 0


def _misused(program: str) -> NoReturn:
    raise UserError("usage", _HELP[program][0], f"see `{program} --help`")


def _run(program: str, work: Callable[[Sequence[str]], int]) -> NoReturn:
    arguments = sys.argv[1:]
    if "--help" in arguments:
        usage, text = _HELP[program]
        print(f"Usage: {usage}\n\n{text}")
        sys.exit(0)
    try:
        status = work(arguments)
        sys.stdout.flush()
    except MigrateError as error:
        print(f"{program}: {error}", file=sys.stderr)
        status = OWN_FAILURE
    except BrokenPipeError:
        status = OWN_FAILURE
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def joingroup() -> NoReturn:
    """Entry point."""
    _run("joingroup", _join)


def showgroup() -> NoReturn:
    """Entry point."""
    _run("showgroup", _show)


def migrategroup() -> NoReturn:
    """Entry point."""
    _run("migrategroup", _migrate)


def resetgroup() -> NoReturn:
    """Entry point."""
    _run("resetgroup", _reset)
