"""Groups of processes (openMosix's miggroup) as migd has them: a number for each process of this host.

By pid and start time; for one that is away, its deputy's. What a guest brings and takes: agent/group_travel.py.
"""

from __future__ import annotations

import pwd
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from agent.group_book import GroupBook
from agent.group_files import Process
from agent.group_server import GroupServer
from agent.group_words import Identity
from agent.journal import Entry, State
from agent.this_host import ThisHost
from criu_hooks.proc import command_of
from migrate import group_messages as words
from migrate import paths

COMMAND_LETTERS = 200


class Groups:
    """For the running loop, from `start` to `close`."""

    def __init__(self, here: ThisHost) -> None:
        self._here = here
        self._book = GroupBook(paths.GROUP_BOOK)
        self._files = GroupServer(
            self._book.group, lambda process, group: self._put({process: group})
        )

    async def start(self) -> None:
        """Have the files served."""
        await self._files.start()

    def close(self) -> None:
        """Unmount them."""
        self._files.close()

    def _put(self, groups: dict[Identity, int]) -> None:
        self._book.put(groups)

    # ------------------------------------------------------------------ clients

    def join(self, request: words.JoinGroup, caller_uid: int) -> words.Joined:
        """Let a client's processes join a group, or leave theirs."""
        return self._change(request.pids, request.group, caller_uid)

    def reset(self, request: words.ResetGroup, caller_uid: int) -> words.Joined:
        """Let those of a group that are a client's leave it."""
        pids = [process.pid for process, _ in self._book.members(request.group)]
        return self._change(pids, 0, caller_uid)

    def _change(self, pids: tuple[int, ...] | list[int], group: int, uid: int) -> words.Joined:
        wanted: dict[Identity, int] = {}
        unjoined = []
        for pid in pids:
            try:
                process = Process.look(pid)
            except OSError:
                unjoined.append(words.Unjoined(pid, "no such process"))
                continue
            if process.may_write(uid):
                wanted[process.identity] = group
            else:
                owner = user_name(process.uid)
                remedy = "only its owner or root changes its group"
                unjoined.append(words.Unjoined(pid, f"belongs to {owner}", remedy))
        self._put(wanted)
        return words.Joined(tuple(process.pid for process in wanted), tuple(unjoined))

    def list(self, request: words.ListGroup) -> Callable[[], words.GroupMembers]:
        """Who is in a group, as a function that is not for the loop: it looks at every process."""
        found = [m for m in self._book.members(request.group) if m[0].pid > request.after]
        rows, more = found[: words.ROWS_AT_ONCE], len(found) > words.ROWS_AT_ONCE
        away = {
            (entry.pid, entry.starttime_ticks): entry
            for entry in self._here.journal.in_state(State.RESUMED)
            if entry.origin_cgroup and entry.boot_id == self._here.boot_id
        }
        name = self._here.name

        def look() -> words.GroupMembers:
            return words.GroupMembers(
                tuple(
                    _row(process, group, name, away.get((process.pid, process.starttime_ticks)))
                    for process, group in rows
                ),
                more,
            )

        return look


def _row(process: Identity, group: int, here: str, deputy: Entry | None) -> words.MemberRow:
    if deputy is not None:
        return words.MemberRow(process.pid, group, deputy.user, here, deputy.peer, deputy.command)
    try:
        user = user_name(Process.look(process.pid).uid)
    except OSError:
        user = "?"
    return words.MemberRow(process.pid, group, user, here, here, command_line(process.pid))


def command_line(pid: int) -> str:
    """As ps shows it, but not longer than `COMMAND_LETTERS`."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        line = b""
    return line.decode(errors="replace")[:COMMAND_LETTERS] or f"[{command_of(pid)}]"


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """His name, or if he has none his number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
