"""The event loop."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.reactor import EDGE, READ, WRITE, Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    with Reactor() as reactor:
        yield reactor


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_a_readable_descriptor_calls_back_until_it_is_read(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    calls: list[int] = []
    reactor.register(pipe[0], READ, calls.append)
    reactor.turn(0)
    assert calls == []
    os.write(pipe[1], b"x")
    reactor.turn(0)
    reactor.turn(0)
    assert calls == [READ, READ]
    os.read(pipe[0], 1)
    reactor.turn(0)
    assert len(calls) == 2


def test_edge_triggering_reports_each_write_once_also_behind_unread_bytes(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    calls: list[int] = []
    reactor.register(pipe[0], READ | EDGE, calls.append)
    for written in range(1, 4):
        os.write(pipe[1], b"x")
        reactor.turn(0)
        reactor.turn(0)
        assert len(calls) == written


def test_modify_and_unregister_take_effect(reactor: Reactor, pipe: tuple[int, int]) -> None:
    calls: list[int] = []
    reactor.register(pipe[1], 0, calls.append)
    reactor.turn(0)
    assert calls == []
    reactor.modify(pipe[1], WRITE)
    reactor.turn(0)
    assert calls == [WRITE]
    reactor.unregister(pipe[1])
    reactor.turn(0)
    assert calls == [WRITE]


def test_a_regular_file_is_refused(reactor: Reactor) -> None:
    with open(__file__) as file, pytest.raises(PermissionError):
        reactor.register(file.fileno(), READ, lambda events: None)


def test_an_event_of_a_closed_descriptor_does_not_reach_the_new_owner_of_its_number(
    reactor: Reactor,
) -> None:
    pipes = [os.pipe(), os.pipe()]
    stale: list[int] = []
    acted: list[int] = []

    def replace_the_other(mine: int, other: int) -> None:
        reactor.unregister(mine)
        if acted:
            return
        acted.append(mine)
        reactor.unregister(other)
        os.close(other)
        fresh, write_end = os.pipe()
        assert fresh == other
        os.close(write_end)
        os.set_blocking(fresh, False)
        reactor.register(fresh, READ, stale.append)

    (a, a_write), (b, b_write) = pipes
    reactor.register(a, READ, lambda events: replace_the_other(a, b))
    reactor.register(b, READ, lambda events: replace_the_other(b, a))
    os.write(a_write, b"x")
    os.write(b_write, b"x")
    reactor.turn(0)
    assert acted
    assert stale == []
    for fd in (a, b, a_write, b_write):
        os.close(fd)


def test_timers_fire_in_order_and_only_once(reactor: Reactor) -> None:
    fired: list[str] = []
    reactor.call_later(0.02, lambda: fired.append("late"))
    reactor.call_later(0.0, lambda: fired.append("early"))
    reactor.call_later(0.03, reactor.stop)
    begun = time.monotonic()
    reactor.run()
    assert fired == ["early", "late"]
    assert time.monotonic() - begun >= 0.03


def test_a_cancelled_timer_neither_fires_nor_wakes(reactor: Reactor) -> None:
    fired: list[str] = []
    timer = reactor.call_later(0.0, lambda: fired.append("cancelled"))
    timer.cancel()
    begun = time.monotonic()
    reactor.turn(0.03)
    assert fired == []
    assert time.monotonic() - begun >= 0.03


def test_deferred_calls_run_before_the_next_wait_and_may_defer_again(reactor: Reactor) -> None:
    order: list[int] = []

    def first() -> None:
        order.append(1)
        reactor.defer(second)

    def second() -> None:
        order.append(2)
        reactor.stop()

    reactor.defer(first)
    reactor.run()
    assert order == [1, 2]


def test_the_end_of_a_process_calls_back_once(reactor: Reactor) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        ends: list[int] = []
        reactor.watch_pid(process.pid, lambda: ends.append(process.pid))
        reactor.turn(0)
        assert ends == []
        assert process.stdin is not None
        process.stdin.close()
        reactor.turn(5)
        reactor.turn(0)
        assert ends == [process.pid]


def test_a_cancelled_watch_of_a_process_is_silent_and_leaks_nothing(reactor: Reactor) -> None:
    open_before = sorted(Path("/proc/self/fd").iterdir())
    with subprocess.Popen(["true"]) as process:
        ends: list[int] = []
        watch = reactor.watch_pid(process.pid, lambda: ends.append(1))
        watch.cancel()
        watch.cancel()
        process.wait()
        reactor.turn(0)
    assert ends == []
    assert sorted(Path("/proc/self/fd").iterdir()) == open_before


def test_a_process_that_does_not_exist_cannot_be_watched(reactor: Reactor) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ProcessLookupError):
        reactor.watch_pid(process.pid, lambda: None)


def test_what_a_callback_raises_leaves_run(reactor: Reactor) -> None:
    def fail() -> None:
        raise KeyError("from the callback")

    reactor.defer(fail)
    with pytest.raises(KeyError):
        reactor.run()
