"""Waiting in the middle of sequential code: for a descriptor, a condition, CRIU, a freeze."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from agent.cgroups import Cgroup
from agent.reactor import READ, WRITE, Reactor
from agent.waiting import await_worker, next_event, wait_for, wait_frozen, wait_until
from criu_hooks.calls import READY, CriuCall, Done, Event, Notify
from migrate.errors import CriuError

LONG = 30.0
"""More than any of these waits may take."""


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


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def say(fd: int) -> None:
    os.write(fd, b"x")


class Call:
    """A CRIU call whose events are said by the test."""

    def __init__(self, reading: int, event: Event) -> None:
        self._reading = reading
        self._event = event

    def fileno(self) -> int:
        return self._reading

    def receive(self, timeout_seconds: float | None = None) -> Event:
        os.read(self._reading, 1)
        return self._event


def test_a_descriptor_that_is_ready_is_not_waited_for(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    assert wait_for(reactor, pipe[1], WRITE, LONG)
    os.write(pipe[1], b"x")
    assert wait_for(reactor, pipe[0], READ, LONG)


def test_a_descriptor_that_never_is_ready_is_given_up(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    begun = time.monotonic()
    assert not wait_for(reactor, pipe[0], READ, 0.02)
    assert time.monotonic() - begun >= 0.02


def test_a_descriptor_may_be_waited_for_again_whatever_came_of_it(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    assert not wait_for(reactor, pipe[0], READ, 0)
    reactor.call_later(0, lambda: say(pipe[1]))
    assert wait_for(reactor, pipe[0], READ, LONG)
    reactor.register(pipe[0], READ, lambda _: None)  # it is nobody's any more


def test_the_other_end_closing_counts_as_ready(reactor: Reactor) -> None:
    reading, writing = os.pipe()
    reactor.call_later(0, lambda: os.close(writing))
    assert wait_for(reactor, reading, READ, LONG)
    os.close(reading)


def test_what_a_callback_raises_leaves_the_wait_and_the_descriptor_free(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    def fail() -> None:
        raise RuntimeError("in a callback")

    reactor.call_later(0, fail)
    with pytest.raises(RuntimeError, match="in a callback"):
        wait_for(reactor, pipe[0], READ, LONG)
    reactor.register(pipe[0], READ, lambda _: None)


def test_waits_may_be_nested(reactor: Reactor, pipe: tuple[int, int]) -> None:
    inner: list[bool] = []

    def wait_within() -> None:
        inner.append(wait_for(reactor, pipe[1], WRITE, LONG))
        os.write(pipe[1], b"x")

    reactor.call_later(0, wait_within)
    assert wait_for(reactor, pipe[0], READ, LONG)
    assert inner == [True]


def test_a_condition_is_looked_at_first_and_after_every_turn(reactor: Reactor) -> None:
    assert wait_until(reactor, lambda: True, 0)
    ticks: list[int] = []
    for number in range(3):
        reactor.call_later(number / 1000, lambda: ticks.append(1))
    assert wait_until(reactor, lambda: len(ticks) == 3, LONG)
    assert not wait_until(reactor, lambda: False, 0.01)


def test_events_of_criu_are_waited_for_in_the_reactor(
    reactor: Reactor, pipe: tuple[int, int]
) -> None:
    call = cast(CriuCall, Call(pipe[0], Notify("post-dump", 5)))
    reactor.call_later(0, lambda: say(pipe[1]))
    assert next_event(reactor, call, LONG) == Notify("post-dump", 5)


def test_a_criu_that_stands_still_has_failed(reactor: Reactor, pipe: tuple[int, int]) -> None:
    call = cast(CriuCall, Call(pipe[0], Done(True)))
    assert next_event(reactor, call, 0.01) == Done(False, "criu made no progress for 0.01 seconds")


def test_the_worker_has_started_when_it_says_so(reactor: Reactor, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    await_worker(reactor, cast(CriuCall, Call(pipe[0], Notify(READY))), LONG)


@pytest.mark.parametrize("event", [Done(False, "killed"), Done(True), Notify("pre-dump")])
def test_a_worker_that_says_anything_else_first_has_not_started(
    reactor: Reactor, pipe: tuple[int, int], event: Event
) -> None:
    os.write(pipe[1], b"x")
    with pytest.raises(CriuError, match="does not start"):
        await_worker(reactor, cast(CriuCall, Call(pipe[0], event)), LONG)


def test_a_worker_that_is_silent_has_not_started(reactor: Reactor, pipe: tuple[int, int]) -> None:
    with pytest.raises(CriuError, match="does not start"):
        await_worker(reactor, cast(CriuCall, Call(pipe[0], Notify(READY))), 0.01)


class Freezing(Cgroup):
    """A cgroup directory as far as waiting for it goes: its events file can be polled."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.still = False
        (path / "cgroup.events").symlink_to("/proc/self/mounts")

    @property
    def frozen(self) -> bool:
        return self.still


def test_a_freeze_may_need_what_the_reactor_brings(reactor: Reactor, tmp_path: Path) -> None:
    cgroup = Freezing(tmp_path)

    def answer() -> None:
        cgroup.still = True

    reactor.call_later(0.005, answer)
    before = open_files()
    assert wait_frozen(reactor, cgroup, LONG)
    assert open_files() == before


def test_a_freeze_that_never_comes_is_given_up(reactor: Reactor, tmp_path: Path) -> None:
    before = open_files()
    assert not wait_frozen(reactor, Freezing(tmp_path), 0.01)
    assert open_files() == before


def test_a_cgroup_that_is_gone_is_an_error(reactor: Reactor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        wait_frozen(reactor, Cgroup(tmp_path / "gone"), 0.01)
