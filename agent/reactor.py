"""One thread, one epoll: descriptors, timers and the ends of processes call back.

Not asyncio, which costs 10 MB of a keeper's 25, and not `selectors`, which hides edge triggering.
"""

import heapq
import os
import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
BROKEN = select.EPOLLERR | select.EPOLLHUP
EDGE = select.EPOLLET


class Timer:
    """A call to come. `cancel` may be called at any time, also after it was made."""

    def __init__(self, deadline: float, order: int, call: Callable[[], None]) -> None:
        self.deadline = deadline
        self._order = order
        self._call: Callable[[], None] | None = call

    def __lt__(self, other: "Timer") -> bool:
        return (self.deadline, self._order) < (other.deadline, other._order)

    def cancel(self) -> None:
        self._call = None

    @property
    def cancelled(self) -> bool:
        return self._call is None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class PidWatch:
    """Waits for the end of one process. `cancel` may be called at any time."""

    def __init__(self, reactor: "Reactor", pid: int, call: Callable[[], None]) -> None:
        self._reactor = reactor
        self._call = call
        self._fd = os.pidfd_open(pid)
        try:
            reactor.register(self._fd, READ, self._ended)
        except BaseException:
            os.close(self._fd)
            raise

    def cancel(self) -> None:
        if self._fd >= 0:
            self._reactor.unregister(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ended(self, events: int) -> None:
        self.cancel()
        self._call()


class _Registration:
    def __init__(self, call: Callable[[int], None], turn: int) -> None:
        self.call = call
        self.turn = turn


class Reactor:
    """The loop. What a callback raises leaves `run`: nothing is swallowed here."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._registrations: dict[int, _Registration] = {}
        self._timers: list[Timer] = []
        self._deferred: list[Callable[[], None]] = []
        self._timer_count = 0
        self._turn = 0
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the epoll descriptor back; registered descriptors stay open."""
        self._epoll.close()
        self._registrations.clear()

    def register(self, fd: int, events: int, call: Callable[[int], None]) -> None:
        """Call `call(events)` whenever one of `events` (or ERR or HUP, always) holds for `fd`.

        :raises PermissionError: `fd` is a file that cannot be waited for (regular file, /dev/null).
        :raises FileExistsError: `fd` is registered already.
        """
        self._epoll.register(fd, events)
        self._registrations[fd] = _Registration(call, self._turn)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Must come before `fd` is closed: epoll would go on reporting a shared description."""
        del self._registrations[fd]
        self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self._timer_count += 1
        timer = Timer(time.monotonic() + seconds, self._timer_count, call)
        heapq.heappush(self._timers, timer)
        return timer

    def defer(self, call: Callable[[], None]) -> None:
        """Call once the events at hand are dealt with, before the next wait."""
        self._deferred.append(call)

    def watch_pid(self, pid: int, call: Callable[[], None]) -> PidWatch:
        """Call when process `pid` has ended; it is the caller who reaps it.

        :raises ProcessLookupError: there is no such process.
        """
        return PidWatch(self, pid, call)

    def fileno(self) -> int:
        """Readable when a `turn` would find something to do (timers aside)."""
        return self._epoll.fileno()

    def run(self) -> None:
        """Until `stop`, or until a callback raises."""
        self._running = True
        while self._running:
            self.turn()

    def stop(self) -> None:
        """Leave `run` at the end of this turn."""
        self._running = False

    def turn(self, seconds: float | None = None) -> None:
        """Wait at most `seconds` (None: for ever) for something to happen, and deal with it."""
        ready = self._epoll.poll(self._patience(seconds))
        self._turn += 1
        for fd, events in ready:
            registration = self._registrations.get(fd)
            # A callback of this turn may have closed fd and got its number again for another file.
            if registration is not None and registration.turn < self._turn:
                registration.call(events)
        now = time.monotonic()
        while self._timers and self._timers[0].deadline <= now:
            heapq.heappop(self._timers).fire()
        deferred, self._deferred = self._deferred, []
        for call in deferred:
            call()

    def _patience(self, seconds: float | None) -> float | None:
        if self._deferred:
            return 0.0
        while self._timers and self._timers[0].cancelled:
            heapq.heappop(self._timers)
        if not self._timers:
            return seconds
        until = max(0.0, self._timers[0].deadline - time.monotonic())
        return until if seconds is None else min(seconds, until)
