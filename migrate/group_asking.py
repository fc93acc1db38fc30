"""What programs ask migd about groups, and how they write and read it."""

from __future__ import annotations

from collections.abc import Iterator

from migrate import client, messages
from migrate import group_messages as words
from migrate.errors import MigrateError, UserError

HOST_ID_MAX = 65535
"""as migrate.config.HostId"""


def parse_group(text: str, *, least: int = 1) -> int:
    """The number of a group. Raises UserError."""
    digits = text.lstrip("0") or "0"
    good = text.isascii() and text.isdecimal() and len(digits) <= len(str(words.GROUP_MAX))
    if not good or not least <= int(digits) <= words.GROUP_MAX:
        raise UserError(
            f"group {text[:20]!r}", "no such number", f"groups are {least} to {words.GROUP_MAX}"
        )
    return int(digits)


def parse_host(text: str) -> tuple[str, int]:
    """A host's name, or "" and its id: whichever `text` is. Raises UserError."""
    if not text.isascii() or not text.isdecimal():
        if not text:
            raise UserError("host", "its name is empty", "write its name or its id")
        return text, 0
    if len(text) > 5 or not 1 <= int(text) <= HOST_ID_MAX:
        raise UserError(f"host id {text[:20]}", f"host ids are 1 to {HOST_ID_MAX}")
    return "", int(text)


def one_line(text: str) -> str:
    """What others have chosen, safe for one line on a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


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
