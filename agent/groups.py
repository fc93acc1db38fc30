"""Groups of processes (openMosix's miggroup) as migd has them: a number for each process of this host.

By pid and start time; for one that is away, its deputy's. What a guest brings and takes: agent/group_travel.py.
"""

from __future__ import annotations

import pwd
from collections.abc import Callable, Sequence, Set
from functools import lru_cache
from pathlib import Path

from agent.group_files import Process
from agent.group_places import Places
from agent.group_plan import Caller, plan
from agent.group_server import GroupServer
from agent.group_travel import GroupTravel, settle_all
from agent.group_words import Identity
from agent.this_host import ThisHost
from criu_hooks.proc import command_of
from migrate import group_messages as words

COMMAND_LETTERS = 200


class Groups:
    """For the running loop, from `start` to `close`."""

    def __init__(self, here: ThisHost, evict: Callable[[Set[str], str], int]) -> None:
        """:param evict: sends guests of this host home, for a reason."""
        self._here = here
        self._evict = evict
        self._files = GroupServer(self._get, lambda process, group: self._put({process: group}))
        self.travel = GroupTravel(here)

    async def start(self) -> None:
        """Have the files served."""
        settle_all(self._here)
        await self._files.start()

    def close(self) -> None:
        """Unmount them."""
        self._files.close()

    def _get(self, process: Identity) -> int:
        settle_all(self._here)
        return self._here.book.group(process)

    def _put(self, groups: dict[Identity, int]) -> None:
        settle_all(self._here)
        self._here.book.put(groups)
        self.travel.changed(groups)

    # ------------------------------------------------------------------ clients

    def join(self, request: words.JoinGroup, caller_uid: int) -> words.Joined:
        """Let a client's processes join a group, or leave theirs."""
        return self._change(request.pids, request.group, caller_uid)

    def reset(self, request: words.ResetGroup, caller_uid: int) -> words.Joined:
        """Let those of a group that are a client's leave it."""
        places = self._places()
        members = self._here.book.members(request.group)
        pids = [process.pid for process, _ in members if not _has_deputy(places, process)]
        return self._change(pids, 0, caller_uid)

    def _change(self, pids: Sequence[int], group: int, uid: int) -> words.Joined:
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
        places = self._places()
        found = [m for m in self._here.book.members(request.group) if m[0].pid > request.after]
        part, more = found[: words.ROWS_AT_ONCE], len(found) > words.ROWS_AT_ONCE

        def look() -> words.GroupMembers:
            rows = tuple(
                _row(process, group, places)
                for process, group in part
                if not _has_deputy(places, process)
            )
            return words.GroupMembers(rows, part[-1][0].pid if more else 0)

        return look

    def plan(self, request: words.PlanGroup, caller: Caller) -> Callable[[], words.GroupPlan]:
        """How a group would move, as a function that is not for the loop. Raises UserError: where to?"""
        config, destination = self._here.config, ""
        if request.host:
            destination = config.host_named(request.host).name
        elif request.host_id:
            destination = config.host_with_id(request.host_id).name
        places = self._places()
        members = [process for process, _ in self._here.book.members(request.group)]
        return lambda: plan(places, members, destination, caller, config)

    def evict(self, request: words.EvictGroup, caller_uid: int) -> words.GroupEvicted:
        """Send the guests of a group home: those that are the caller's; root's word goes for all."""
        places, guests, pids = self._places(), set(), []
        for process, _ in self._here.book.members(request.group):
            inmate = places.inmate(process.pid)
            if inmate is None or inmate.offer.home == places.host:
                continue
            if caller_uid in (0, inmate.offer.owner.uid):
                guests.add(inmate.offer.guest)
                pids.append(process.pid)
        self._evict(guests, f"group {request.group} was sent home")
        return words.GroupEvicted(tuple(pids))

    def _places(self) -> Places:
        settle_all(self._here)
        return Places.of(self._here)


def _has_deputy(places: Places, process: Identity) -> bool:
    """Whether a process is at home again in a capsule: there its deputy stands for it."""
    inmate = places.inmate(process.pid)
    return inmate is not None and inmate.is_root and inmate.offer.home == places.host


def _row(process: Identity, group: int, places: Places) -> words.MemberRow:
    pid, here = process.pid, places.host
    entry = places.deputies.get(process)
    if entry is not None:
        return words.MemberRow(pid, group, entry.user, here, entry.peer, entry.command)
    inmate = places.inmate(pid)
    home = inmate.offer.home if inmate is not None else here
    try:
        user = user_name(Process.look(pid).uid)
    except OSError:
        user = "?"
    return words.MemberRow(pid, group, user, home, here, command_line(pid))


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
