"""Resource limits of another process, where prlimit(2) may not ask for those of another user's."""

from __future__ import annotations

import resource

from agent.guestwords import Limit

_NAME_WIDTH = 26


def parse_limits(table: str) -> tuple[Limit, ...]:
    """From /proc/PID/limits, which lists them in the order of their numbers (fs/proc/base.c).

    :raises ValueError: that is no such table.
    """
    limits = []
    for number, line in enumerate(table.splitlines()[1:]):
        soft, hard = (_value(word) for word in line[_NAME_WIDTH:].split()[:2])
        limits.append(Limit(number, soft, hard))
    return tuple(limits)


def stricter(one: int, other: int) -> int:
    """The stricter of two limits; RLIM_INFINITY is none."""
    if one == resource.RLIM_INFINITY:
        return other
    return one if other == resource.RLIM_INFINITY else min(one, other)


def _value(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)
