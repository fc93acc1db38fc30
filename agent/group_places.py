"""Where the processes of this host stand: which are deputies, which belong to guests that run here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.cgroups import SLICE, Cgroup, guest_path
from agent.group_words import Identity
from agent.journal import Entry, Side, State
from agent.link import Offer
from agent.this_host import ThisHost
from criu_hooks.proc import pid_starttime

_TREE = f"/{SLICE}/keeper-"


@dataclass(frozen=True)
class Inmate:
    """A process of a guest that runs here."""

    offer: Offer
    """by which the guest came"""
    pid: int
    """as it counts itself: at home's first move, home's own"""

    @property
    def is_root(self) -> bool:
        """Whether it is the one that has a deputy."""
        return self.pid == self.offer.ids.pid


@dataclass(frozen=True)
class Places:
    """As they are at one moment; may be asked off the loop."""

    host: str
    deputies: dict[Identity, Entry]
    """by the first move of each"""
    keepers: dict[str, Offer]
    """of the guests that run here"""

    @classmethod
    def of(cls, here: ThisHost) -> Places:
        """Of this host now."""
        return cls(
            here.name,
            {
                Identity(entry.pid, entry.starttime_ticks): entry
                for entry in here.journal.in_state(State.RESUMED)
                if entry.side is Side.SOURCE
                and entry.origin_cgroup
                and entry.boot_id == here.boot_id
            },
            {
                agent.guest: agent.offer
                for agent in here.agents.all()
                if agent.role == "keeper" and agent.offer is not None
            },
        )

    def deputy_of(self, offer: Offer) -> tuple[Identity, Entry] | None:
        """The deputy here of a guest, if its home is here."""
        for process, entry in self.deputies.items():
            if entry.guest == offer.guest:
                return process, entry
        return None

    def has_deputy(self, process: Identity) -> bool:
        """Whether a process is at home again in a capsule: there its deputy stands for it."""
        inmate = self.inmate(process.pid)
        return inmate is not None and inmate.is_root and inmate.offer.home == self.host

    def inmate(self, pid: int) -> Inmate | None:
        """What this process is to a guest that runs here, if it is one's."""
        if not self.keepers:
            return None
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
                _, found, rest = line.partition(_TREE)
                offer = self.keepers.get(rest.partition("/")[0]) if found else None
                if offer is not None:
                    return Inmate(offer, inner_pid(pid))
        return None


def inner_pid(pid: int) -> int:
    """A process's pid as it sees it itself. Raises OSError."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise ProcessLookupError


def inmates(offer: Offer) -> Iterator[tuple[int, Identity]]:
    """The processes of a guest that runs here, by their inner pids."""
    for pid in Cgroup(guest_path("keeper", offer.guest, "tree")).pids():
        with contextlib.suppress(OSError):
            yield inner_pid(pid), Identity(pid, pid_starttime(pid))
