"""The groups of processes that are not where they were born: a number stays with its process.

It goes along with the offer. A change at home is told to the host where the guest runs, and the other way
round, as soon as that can be reached; a hop carries what the host knows that it leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from agent import peer_messages
from agent.group_book import is_there
from agent.group_places import Places, inmates, inner_pid
from agent.group_words import Identity
from agent.journal import Side, State
from agent.link import GroupMember, Offer
from agent.peers import AnswerLost, PeerUnreachable
from agent.this_host import RETRY_SECONDS, ThisHost
from criu_hooks.tree import ProcessTree
from migrate.errors import PeerError


def taken_along(here: ThisHost, tree: ProcessTree) -> tuple[GroupMember, ...]:
    """The numbers of a tree that is about to leave this host."""
    found = []
    for process in tree.members:
        group = here.book.group(Identity(process.pid, process.starttime_ticks))
        if group:
            try:
                found.append(GroupMember(inner_pid(process.pid), group))
            except OSError:
                continue  # it has ended
    return tuple(found)


def settle(here: ThisHost, offers: Iterable[Offer | None]) -> None:
    """Write down what guests have brought, unless that is done or they do not run here yet."""
    for offer in offers:
        if offer is None or not offer.groups or here.book.is_settled(offer.transaction):
            continue
        entry = here.journal.find(offer.transaction, Side.DESTINATION)
        if entry is None or entry.state is not State.RESUMED:
            continue
        brought = {member.pid: member.group for member in offer.groups}
        found = {process: brought[pid] for pid, process in inmates(offer) if pid in brought}
        here.book.settle(offer.transaction, found)


def settle_all(here: ThisHost) -> None:
    """As `settle`, for all guests."""
    settle(here, (agent.offer for agent in here.agents.all() if agent.role == "keeper"))


class GroupTravel:
    """Tells the other end of a guest what is changed at this one. For the running loop."""

    def __init__(self, here: ThisHost) -> None:
        self._here = here
        self._telling: dict[str, dict[int, int]] = {}
        """guest → numbers that are still to be told, by inner pid"""

    def numbers(self, processes: Iterable[Identity]) -> dict[Identity, int]:
        """As they are now, for `catch_up`."""
        return {process: self._here.book.group(process) for process in processes}

    def catch_up(self, pid: int, before: dict[Identity, int]) -> None:
        """The tree of a process of this host has moved: tell what was changed meanwhile.

        :param before: the numbers of its processes, as home counts, when that began.
        """
        entry = self._here.journal.deputy(pid)
        for process, group in self.numbers(before).items():
            # A member that is away has ended here, and may have been forgotten.
            if entry is None or group == before[process] or not (group or is_there(process)):
                continue
            if process.pid == pid:
                self.changed({process: group})
            else:
                self._tell(entry.guest, process.pid, group)

    def changed(self, groups: dict[Identity, int]) -> None:
        """Processes of this host are in other groups now."""
        places = Places.of(self._here)
        if not places.deputies and not places.keepers:
            return
        for process, group in groups.items():
            self._changed(places, process, group)

    def _changed(self, places: Places, process: Identity, group: int) -> None:
        entry = places.deputies.get(process)
        if entry is not None:
            offer = places.keepers.get(entry.guest)
            if offer is not None:
                self._put_inside(offer, entry.pid, group)
            else:
                self._tell(entry.guest, entry.pid, group)
            return
        inmate = places.inmate(process.pid)
        if inmate is None or not inmate.is_root:
            return
        found = places.deputy_of(inmate.offer)
        if found is not None:
            self._here.book.put({found[0]: group})
        elif inmate.offer.home != self._here.name:
            self._tell(inmate.offer.guest, inmate.pid, group)

    def told(self, peer: str, news: peer_messages.SetGroup) -> peer_messages.GroupSet:
        """What the other end of a guest says. Raises PeerError: it is not that guest's home or host."""
        keeper = self._here.keeper_of(news.guest, peer)
        if keeper is not None and keeper.offer is not None:
            settle(self._here, [keeper.offer])
            self._put_inside(keeper.offer, news.pid, news.group)
            return peer_messages.GroupSet()
        for process, entry in Places.of(self._here).deputies.items():
            if (entry.guest, entry.peer, entry.pid) == (news.guest, peer, news.pid):
                self._here.book.put({process: news.group})
                return peer_messages.GroupSet()
        raise PeerError(f"guest {news.guest}", "is not here", "look with `migctl ps`")

    def _put_inside(self, offer: Offer, pid: int, group: int) -> None:
        self._here.book.put({process: group for inner, process in inmates(offer) if inner == pid})

    def _tell(self, guest: str, pid: int, group: int) -> None:
        busy = guest in self._telling
        self._telling.setdefault(guest, {})[pid] = group
        if not busy:
            self._here.spawn(self._keep_telling(guest))

    async def _keep_telling(self, guest: str) -> None:
        try:
            while (news := self._telling[guest]) and (host := self._other_end(guest)) is not None:
                pid, group = next(iter(news.items()))
                try:
                    question = peer_messages.SetGroup(guest, pid, group)
                    await self._here.ask(host, question, peer_messages.GroupSet)
                except (AnswerLost, PeerUnreachable):
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                if news[pid] == group:
                    del news[pid]
        finally:
            del self._telling[guest]

    def _other_end(self, guest: str) -> str | None:
        """The host to tell; None if the guest has ended, or both ends are here."""
        places = Places.of(self._here)
        offer = places.keepers.get(guest)
        if offer is not None:
            return offer.home if offer.home != self._here.name else None
        for entry in places.deputies.values():
            if entry.guest == guest:
                return entry.peer
        return None
