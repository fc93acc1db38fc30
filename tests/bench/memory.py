"""What the product takes at rest, and what a move takes for a while."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from testbed.client import Nodes
from testbed.node import Node

from bench.contestants import AWAY, SETTLE_LINES, Ours
from bench.errors import BenchFailed
from bench.processes import Task, memory_kib, tasks
from bench.ticker import HOME, Ticker

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Footprint:
    """What the processes of one role take. `rss_kib`: pages that they share are counted twice."""

    processes: int
    rss_kib: int
    pss_kib: int


@dataclass(frozen=True)
class Resting:
    """The product's processes while one guest is away and nothing moves."""

    migd: Footprint
    guard: Footprint
    keeper: Footprint
    deputy: Footprint


@dataclass(frozen=True)
class Extra:
    """The most that a move took beyond what was there before, on each side."""

    source_kib: int
    destination_kib: int


@dataclass
class _Peak:
    """The most memory that a node took while it was watched, above where it began."""

    node: Node
    base_kib: int = 0
    peak_kib: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.base_kib = self.peak_kib = memory_kib(self.node)
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak_kib = max(self.peak_kib, memory_kib(self.node))

    @property
    def extra_kib(self) -> int:
        return self.peak_kib - self.base_kib


def migd_cpu_ms(nodes: Nodes, seconds: float) -> float:
    """CPU time that migd uses while nothing moves."""
    task = _of_role(nodes, HOME, "bin/migd")[0]
    before = task.cpu_ms()
    time.sleep(seconds)  # an interval is what is measured
    return task.cpu_ms() - before


def resting(nodes: Nodes) -> Resting:
    """Move a small program away, and look."""
    with Ticker(nodes, 0) as ticker:
        Ours(nodes).move(ticker)
        return Resting(
            migd=_footprint(_of_role(nodes, HOME, "bin/migd")),
            guard=_footprint(_of_role(nodes, HOME, "agent.guard")),
            keeper=_footprint(_of_role(nodes, AWAY, "agent.keeper")),
            deputy=_footprint([ticker.original]),
        )


def extra_of_move(nodes: Nodes, mebibytes: int) -> Extra:
    """Watch both sides of one move; the program's own memory is not counted as extra."""
    source, destination = (_Peak(nodes.node(name)) for name in (HOME, AWAY))
    with Ticker(nodes, mebibytes) as ticker:
        own_kib = ticker.original.anonymous_kib()
        with source.watched(), destination.watched():
            Ours(nodes).move(ticker)
            ticker.wait_for_lines(SETTLE_LINES)
    return Extra(source.extra_kib, destination.extra_kib - own_kib)


def _of_role(nodes: Nodes, node: str, word: str) -> list[Task]:
    found = [task for task in tasks(nodes.node(node)) if word in task.command]
    if not found:
        raise BenchFailed(f"{node}: no process with {word} in its command line")
    return found


def _footprint(found: list[Task]) -> Footprint:
    return Footprint(
        len(found), sum(task.rss_kib() for task in found), sum(task.pss_kib() for task in found)
    )
