"""Waiting in the middle of sequential code, while the reactor goes on serving everything else."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from agent.cgroups import Cgroup
from agent.reactor import READ, Reactor
from criu_hooks.calls import READY, CriuCall, Done, Event, Notify
from migrate.errors import CriuError


def wait_for(reactor: Reactor, fd: int, events: int, seconds: float) -> bool:
    """Turn the reactor until `fd` has one of `events`; False after `seconds`."""
    happened = False

    def call(seen: int) -> None:
        nonlocal happened
        happened = True
        reactor.modify(fd, 0)

    reactor.register(fd, events, call)
    try:
        return wait_until(reactor, lambda: happened, seconds)
    finally:
        reactor.unregister(fd)


def wait_until(reactor: Reactor, holds: Callable[[], bool], seconds: float) -> bool:
    """Turn the reactor until `holds()`; False after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        reactor.turn(left)
    return True


def next_event(reactor: Reactor, call: CriuCall, seconds: float) -> Event:
    """The next event of a CRIU call, while the reactor goes on."""
    if not wait_for(reactor, call.fileno(), READ, seconds):
        return Done(False, f"criu made no progress for {seconds:g} seconds")
    return call.receive(1)


def await_worker(reactor: Reactor, call: CriuCall, seconds: float) -> None:
    """Before anything freezes: until the process that talks to CRIU has started.

    :raises CriuError: it has not, in time.
    """
    event = next_event(reactor, call, seconds)
    if not isinstance(event, Notify) or event.script != READY:
        raise CriuError("criu", "the process that talks to it does not start")


def wait_frozen(reactor: Reactor, cgroup: Cgroup, seconds: float) -> bool:
    """Turn the reactor until all of the cgroup stands still; False after `seconds`.

    A task that waits for the home view cannot freeze before its answer, which the reactor may have
    to bring.
    """
    with open(cgroup.path / "cgroup.events") as events:
        reactor.register(events.fileno(), select.EPOLLPRI, lambda _: None)
        try:
            return wait_until(reactor, lambda: cgroup.frozen, seconds)
        finally:
            reactor.unregister(events.fileno())
