"""Looks at this host: load averages, processors, idle time. Every `sample_seconds`, in a thread."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.load_idle import IdleWatch
from agent.load_policy import Loads

PROC = Path("/proc")
WEIGHT = 0.4
"""Of the newest sample in the weighted averages: after a minute of 5 s samples, an old one counts 0.2 %."""


@dataclass(frozen=True)
class Sample:
    """One look. Loads are whole ones, not for each processor."""

    loads: Loads
    cpu_percent: float
    """weighted average of utilisation, 0 to 100"""
    ready_queue: float
    """weighted average of processes that run or wait for a processor"""
    processors: int
    idle_seconds: float
    up_seconds: float

    @property
    def loads_each(self) -> Loads:
        """For each processor."""
        one, five, fifteen = (load / self.processors for load in self.loads)
        return one, five, fifteen


class Sampler:
    """Keeps what the next sample needs of the last."""

    def __init__(self, idle: IdleWatch | None = None, proc: Path = PROC) -> None:
        self._idle = idle or IdleWatch()
        self._proc = proc
        self._cpu = -1.0
        self._queue = -1.0
        psutil.cpu_percent()  # the next call tells about the time since this one

    def sample(self) -> Sample:
        """Look now. May take some milliseconds.

        :raises OSError: there is no /proc.
        """
        loads, running = self._load_averages()
        self._cpu = _weigh(self._cpu, psutil.cpu_percent())
        self._queue = _weigh(self._queue, running)
        up_seconds = self._up_seconds()
        return Sample(
            loads=loads,
            cpu_percent=min(100.0, max(0.0, self._cpu)),
            ready_queue=self._queue,
            processors=os.cpu_count() or 1,
            idle_seconds=self._idle.idle_seconds(up_seconds),
            up_seconds=up_seconds,
        )

    def _load_averages(self) -> tuple[Loads, float]:
        """From the file, not getloadavg(3): sysinfo(2) would not see what is bound over it."""
        try:
            one, five, fifteen, tasks = (self._proc / "loadavg").read_text().split()[:4]
            loads = (float(one), float(five), float(fifteen))
            return loads, float(max(0, int(tasks.partition("/")[0]) - 1))
        except ValueError:
            return psutil.getloadavg(), 0.0

    def _up_seconds(self) -> float:
        return float((self._proc / "uptime").read_text().split()[0])


def _weigh(average: float, newest: float) -> float:
    return newest if average < 0 else (1 - WEIGHT) * average + WEIGHT * newest
