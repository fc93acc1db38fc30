"""Groups of processes (openMosix's miggroup) as migd has them: a number for each process of this host.

By pid and start time; for one that is away, its deputy's. What a guest brings and takes: agent/group_travel.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from agent.group_files import Process
from agent.group_places import Places
from agent.group_plan import Caller, plan
from agent.group_rows import row_of, user_name
from agent.group_server import GroupServer
from agent.group_travel import GroupTravel, settle_all
from agent.group_words import Identity
from agent.this_host import ThisHost
from migrate import group_messages as words


class Groups:
    """For the running loop, from `start` to `close`."""

    def __init__(self, here: ThisHost, evict: Callable[[Set[str], str], int]) -> None:
        """:param evict: sends guests of this host home, for a reason."""
        self._here = here
        self._evict = evict
        self._files = GroupServer(self._get, lambda process, group: self._put({process: group}))
        self.travel = GroupTravel(here)

    def start(self) -> None:
        """Have the files served."""
        settle_all(self._here)
        self._files.start()

    async def mounted(self) -> None:
        """Return when the files are there, or cannot be."""
        await self._files.mounted()

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
        pids = [process.pid for process, _ in members if not places.has_deputy(process)]
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
        noted = self._here.book.noted(request.group, request.after)
        part, more = noted[: words.ROWS_AT_ONCE], len(noted) > words.ROWS_AT_ONCE

        def look() -> words.GroupMembers:
            rows = (row_of(process, group, places) for process, group in part)
            after = part[-1][0].pid if more else 0
            return words.GroupMembers(tuple(row for row in rows if row is not None), after)

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
