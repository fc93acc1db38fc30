"""Whether this host takes guests: load and idle time against thresholds, with hysteresis. No I/O.

The constants are Sprite's (Douglis and Ousterhout, Transparent Process Migration, 1991). Loads are
for each processor: Sprite's hosts had one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from migrate.config import Config

Loads = tuple[float, float, float]
PERIODS = ("1", "5", "15")


class Verdict(enum.StrEnum):
    """What a host says of itself."""

    ACCEPTS = "ACCEPTS"
    ACTIVE = "ACTIVE"
    REFUSES = "REFUSES"


@dataclass(frozen=True)
class Thresholds:
    """When guests are welcome. Loads of the last 1, 5 and 15 minutes, for each processor."""

    idle_seconds: float = 30.0
    accept: Loads = (0.75, 1.0, 1.5)
    """once closed, the host opens again when all three loads are below these"""
    stop: Loads = (2.5, 2.75, 3.0)
    """an open host closes when any load is above its own"""

    @classmethod
    def of(cls, config: Config) -> Thresholds:
        """Those of the configuration."""
        return cls(config.idle_seconds, config.load_accept, config.load_stop)


@dataclass(frozen=True)
class Judgement:
    """A verdict, and its reason for people ("" if it accepts)."""

    verdict: Verdict
    reason: str = ""

    @property
    def accepts(self) -> bool:
        return self.verdict is Verdict.ACCEPTS


def judge_host(
    before: Verdict | None,
    loads: Loads,
    idle_seconds: float,
    thresholds: Thresholds,
    *,
    refusal: str = "",
) -> Judgement:
    """The verdict now.

    :param before: the last one; None at the start, when the host counts as closed.
    :param loads: for each processor.
    :param refusal: an administrator's reason to take no guests; empty if there is none.
    """
    if refusal:
        return Judgement(Verdict.REFUSES, refusal)
    if idle_seconds < thresholds.idle_seconds:
        return Judgement(Verdict.ACTIVE, "somebody works there")
    limits = thresholds.stop if before is Verdict.ACCEPTS else thresholds.accept
    for period, load, limit in zip(PERIODS, loads, limits, strict=True):
        if load > limit:
            reason = f"its load of {period} min is {load:.2f} a processor, above {limit:g}"
            return Judgement(Verdict.ACTIVE, reason)
    return Judgement(Verdict.ACCEPTS)


def has_room(used: tuple[int, int, int], slots: int, priority: int) -> bool:
    """Whether one more guest of this priority may come.

    :param used: slots in use by LOW, NORMAL and HIGH. Guests of lower priority do not count.
    """
    return sum(used[priority:]) < slots
