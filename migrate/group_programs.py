"""openMosix's miggroup programs: `joingroup`, `showgroup`, `migrategroup`, `resetgroup`.

What they print on stdout is what its manual shows. Exit status: 1 if some process did not do what
was wanted, which stderr tells; 125 if nothing was done.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from migrate import client, messages
from migrate import group_messages as words
from migrate.errors import MigrateError, UserError
from migrate.pids import parse_pid

SOME_FAILED = 1
OWN_FAILURE = 125

_HELP = {
    "joingroup": (
        "joingroup PID... GROUP",
        "Let processes join a group: a number, 1 to 2147483647; 0: they leave theirs.",
    ),
    "showgroup": ("showgroup [--json] GROUP", "Show the processes of a group."),
    "resetgroup": ("resetgroup GROUP", "Let the processes of a group leave it."),
}


def parse_group(text: str, *, least: int = 1) -> int:
    """The number of a group. Raises UserError."""
    digits = text.lstrip("0") or "0"
    good = text.isascii() and text.isdecimal() and len(digits) <= len(str(words.GROUP_MAX))
    if not good or not least <= int(digits) <= words.GROUP_MAX:
        raise UserError(
            f"group {text[:20]!r}", "no such number", f"groups are {least} to {words.GROUP_MAX}"
        )
    return int(digits)


def one_line(text: str) -> str:
    """What others have chosen, safe for one line on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


# ---------------------------------------------------------------------- asking migd


def ask(request: messages.Request) -> messages.Reply:
    """The final reply. Raises MigrateError: migd refuses, or cannot be reached."""
    *_, reply = client.ask(request)
    if isinstance(reply, messages.Refused):
        first = reply.obstacles[0]
        raise MigrateError(first.what, first.reason, first.remedy)
    return reply


def members(group: int) -> Iterator[words.MemberRow]:
    """Who is in a group (0: in any), by pid. Raises MigrateError."""
    after = -1
    while after:
        reply = ask(words.ListGroup(group, max(after, 0)))
        assert isinstance(reply, words.GroupMembers)
        yield from reply.rows
        after = reply.more_after


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


def resetgroup() -> NoReturn:
    """Entry point."""
    _run("resetgroup", _reset)
