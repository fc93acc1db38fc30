"""What is left of a guest when its root has ended: background processes, which live on as at home."""

from __future__ import annotations

import select
from collections.abc import Callable

from agent.cgroups import Cgroup
from agent.reactor import Reactor


class RestWatch:
    """Calls `on_empty` once, when the last process of a cgroup has ended."""

    def __init__(self, reactor: Reactor, cgroup: Cgroup, on_empty: Callable[[], None]) -> None:
        self._reactor = reactor
        self._on_empty = on_empty
        self._events = (cgroup.path / "cgroup.events").open()
        reactor.register(self._events.fileno(), select.EPOLLPRI, lambda _: self._look())
        reactor.call_later(0, self._look)

    def _look(self) -> None:
        if self._events.closed:
            return
        # Read through this descriptor: that is what the next event is counted from.
        self._events.seek(0)
        if "populated 0" in self._events.read().splitlines():
            self.close()
            self._on_empty()

    def close(self) -> None:
        """Watch no longer."""
        if not self._events.closed:
            self._reactor.unregister(self._events.fileno())
            self._events.close()
