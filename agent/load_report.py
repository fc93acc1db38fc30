"""What a host says of itself to the central daemon. It carries no name: that is its key's.

It carries no time of day either: clocks of hosts may differ.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from agent.load_policy import Verdict
from migrate.errors import PeerError
from migrate.mig_messages import GuestCount, Uid, Word

VERSION = 1
"""Raised whenever the meaning of a report changes."""

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Guests = Annotated[tuple[GuestCount, ...], msgspec.Meta(max_length=1024)]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Fields as in migrate.mig_messages.HostInfo."""

    version: int = VERSION
    machine: Word
    verdict: Verdict
    reason: Word = ""
    loads: tuple[Amount, Amount, Amount]
    cpu_percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    ready_queue: Amount = 0.0
    processors: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)] = 1
    idle_seconds: Amount
    up_seconds: Amount = 0.0
    slots: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] = 1
    guests: Guests = ()

    def check(self, host: str) -> None:
        """What types cannot say.

        :raises PeerError: it makes no sense.
        """
        if self.version != VERSION:
            raise PeerError(
                f"host {host}",
                f"its reports are of version {self.version}, not {VERSION}",
                "use the same version",
            )
        amounts = (*self.loads, self.cpu_percent, self.ready_queue, self.idle_seconds)
        if not all(map(math.isfinite, (*amounts, self.up_seconds))):
            raise PeerError(f"host {host}", "its report holds something that is no number")


def uses(guests: Guests) -> dict[tuple[Uid, int], int]:
    """Guests of each user and priority."""
    found: dict[tuple[Uid, int], int] = {}
    for guest in guests:
        key = (guest.uid, int(guest.priority))
        found[key] = found.get(key, 0) + guest.count
    return found
