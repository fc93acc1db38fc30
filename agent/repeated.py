"""Log lines that somebody else can cause at will: the first few at once, the rest counted."""

from __future__ import annotations

import asyncio
import logging

PERIOD_SECONDS = 60.0


class Repeated:
    """Bounds the lines about each one who causes them. For the running loop."""

    def __init__(
        self, log: logging.Logger, *, burst: int = 1, period_seconds: float = PERIOD_SECONDS
    ) -> None:
        """:param burst: how many lines about one are written in a period before they are counted."""
        self._log = log
        self._burst = burst
        self._period = period_seconds
        self._seen: dict[str, int] = {}

    def say(self, level: int, whom: str, text: str) -> None:
        """Log ``whom: text``, or count it if there have been enough about `whom` lately."""
        count = self._seen.get(whom, 0)
        if not count:
            asyncio.get_running_loop().call_later(self._period, self._sum_up, level, whom)
        self._seen[whom] = count + 1
        if count < self._burst:
            self._log.log(level, "%s: %s", whom, text)

    def _sum_up(self, level: int, whom: str) -> None:
        untold = self._seen.pop(whom) - self._burst
        if untold > 0:
            period = f"{self._period:g} s"
            self._log.log(level, "%s: %d more like that within %s", whom, untold, period)
