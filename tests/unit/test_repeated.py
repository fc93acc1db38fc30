"""A flood of refused connections does not become a flood of log lines."""

import asyncio
import logging
from collections.abc import Callable

import pytest

from agent.repeated import Repeated

log = logging.getLogger("repeated")


async def lines_until(caplog: pytest.LogCaptureFixture, holds: Callable[[list[str]], bool]) -> None:
    while not holds(caplog.messages):
        await asyncio.sleep(0.001)


def test_each_one_gets_a_line_and_then_a_count(caplog: pytest.LogCaptureFixture) -> None:
    async def flood() -> None:
        repeated = Repeated(log, period_seconds=0.01)
        for _ in range(1000):
            repeated.say(logging.INFO, "uid 1001", "has too many requests open")
        repeated.say(logging.INFO, "uid 1002", "has too many requests open")
        await lines_until(caplog, lambda said: len(said) >= 3)

    caplog.set_level(logging.INFO)
    asyncio.run(flood())
    assert caplog.messages == [
        "uid 1001: has too many requests open",
        "uid 1002: has too many requests open",
        "uid 1001: 999 more like that within 0.01 s",
    ]


def test_after_the_period_there_is_a_line_again(caplog: pytest.LogCaptureFixture) -> None:
    async def twice() -> None:
        repeated = Repeated(log, burst=2, period_seconds=0.01)
        for _ in range(3):
            repeated.say(logging.INFO, "host node2", "connection refused")
        await lines_until(caplog, lambda said: len(said) == 3)
        repeated.say(logging.INFO, "host node2", "connection refused")

    caplog.set_level(logging.INFO)
    asyncio.run(twice())
    said = "host node2: connection refused"
    assert caplog.messages == [said, said, "host node2: 1 more like that within 0.01 s", said]
