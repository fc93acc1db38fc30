"""`migctl group evict`: a group's processes come home from wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from migrate import client, messages
from migrate import group_messages as words
from migrate.errors import MigrateError, UserError
from migrate.group_asking import ask, members
from migrate.pids import format_pid


def evict(group: int, say: Callable[[str], None]) -> Iterator[MigrateError]:
    """Guests here are frozen at once and leave; those that are away from here are moved home.

    :param say: gets what was done, line by line.
    :return: why some did not come.
    """
    evicted = ask(words.EvictGroup(group))
    assert isinstance(evicted, words.GroupEvicted)
    for pid in evicted.pids:
        say(f"{format_pid(pid)} is sent home")
    for row in list(members(group)):
        if row.where == row.home or row.pid in evicted.pids:
            continue
        *_, reply = client.ask(messages.Move(row.pid, row.home))
        if isinstance(reply, messages.Moved):
            say(f"{format_pid(row.pid)} → {reply.host}")
        elif isinstance(reply, messages.Refused):
            yield from (UserError(o.what, o.reason, o.remedy) for o in reply.obstacles)
