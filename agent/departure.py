"""The source's side of a migration: freeze, dump, commit. Used by a guard (first migration) and a keeper (hops).

Up to COMMITTED every failure puts the original back to work. After it the original stays frozen until the
destination has said what it recorded.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.bulk import Bulk
from agent.cgroups import Cgroup
from agent.faults import reach
from agent.journal import Journal, Side, State
from agent.link import (
    Aborted,
    Commit,
    Dumped,
    Planned,
    Prepared,
    Progress,
    Ready,
    Resumed,
    StartDeparture,
)
from agent.page_pump import page_sockets, pump_ahead, pump_pages
from agent.reactor import Reactor
from agent.waiting import await_worker, next_event, wait_frozen, wait_until
from criu_hooks.calls import CriuCall, Done, DumpRequest, spawn_swrk
from criu_hooks.precopy import KnownPages
from criu_hooks.urgency import urgent
from criu_hooks.vfork import amid_vfork
from migrate.errors import CriuError, HostError, MigrateError, PeerError, UserError

PREPARE_SECONDS = 30.0
VFORK_SECONDS = 0.005
"""between two freezes, if the first one came between vfork and execve"""


class InDoubt(Exception):
    """Committed, but the destination has not said RESUMED; only its record can tell."""


class Original(Protocol):
    """The tree that leaves, as its guard or keeper knows it."""

    @property
    def pid(self) -> int:
        """of the root, as criu counts"""

    @property
    def cgroup(self) -> Cgroup:
        """the tree's own cgroup"""

    @property
    def proc_fd(self) -> int:
        """a /proc whose pids are as criu counts"""

    @property
    def shell_job(self) -> bool:
        """the root leads no session of its own"""

    @property
    def terminal_keys(self) -> tuple[str, ...]:
        """CRIU's names of the tree's terminal"""

    def plan(self) -> Planned:
        """What will probably be Dumped; nothing is frozen yet. Raises MigrateError: it cannot move."""

    def gather(self) -> None:
        """Move the tree into its cgroup."""

    def enter(self) -> None:
        """In the child that becomes criu: enter the tree's namespaces."""

    def describe(self) -> Dumped:
        """Once all is frozen: what the destination must know. Raises MigrateError: it cannot move."""

    def put_back(self) -> None:
        """Undo `gather`, and let the tree run."""


@dataclass
class Outcome:
    """What a departure cost."""

    frozen_seconds: float
    sent_bytes: int


class Departure:
    """One attempt to move one tree."""

    def __init__(
        self,
        reactor: Reactor,
        journal: Journal,
        bulk: Bulk,
        start: StartDeparture,
        original: Original,
        progress: Callable[[Progress], None],
    ) -> None:
        self._reactor = reactor
        self._journal = journal
        self._bulk = bulk
        self._start = start
        self._original = original
        self._report = progress
        self._patience = start.offer.freeze_limit_seconds
        self._frozen_at = 0.0

    def run(self, call: CriuCall, images: Path) -> Outcome:
        """Move it.

        :param call: prepared already.
        :param images: an empty directory for the small images, on a file system in memory.
        :raises MigrateError: nothing has happened, the tree runs as before.
        :raises InDoubt: see there.
        """
        with urgent():
            return self._run(call, images)

    def _run(self, call: CriuCall, images: Path) -> Outcome:
        transaction = self._start.offer.transaction
        try:
            reach("source-begun")
            self._bulk.send_message(self._original.plan())
            self._original.gather()
            with self._dumper(call, images) as pages:
                self._expect(Prepared, PREPARE_SECONDS)
                self._progress("prepared")
                reach("source-prepared")
                known = pump_ahead(
                    self._reactor,
                    self._bulk,
                    self._original.proc_fd,
                    self._original.cgroup.pids(),
                    lambda: self._progress("memory"),
                )
                self._dump(call, images, pages, known)
            self._expect(Ready, self._patience)
            self._progress("ready")
            reach("source-ready")
            if not wait_frozen(self._reactor, self._original.cgroup, self._patience):
                raise HostError("cgroup", "the tree did not stay frozen")
        except BaseException as error:
            self._journal.move(
                transaction, Side.SOURCE, State.ABORTED, after=State.BEGUN, reason=str(error)
            )
            self._original.put_back()
            raise
        if not self._journal.move(transaction, Side.SOURCE, State.COMMITTED, after=State.BEGUN):
            self._original.put_back()
            raise HostError("journal", "the migration was rolled back meanwhile")
        self._progress("committed")
        reach("source-committed")
        return self._commit()

    def _progress(self, step: str) -> None:
        at_ms = (time.monotonic() - self._frozen_at) * 1000 if self._frozen_at else 0.0
        self._report(Progress(step, self._bulk.sent_bytes, at_ms))

    def _commit(self) -> Outcome:
        try:
            self._bulk.send_message(Commit())
            answer = self._bulk.receive_message()
        except PeerError as error:
            raise InDoubt(str(error)) from error
        seconds = time.monotonic() - self._frozen_at
        self._progress("resumed")
        reach("source-answered")
        if isinstance(answer, Resumed):
            self._journal.move(
                self._start.offer.transaction, Side.SOURCE, State.RESUMED, after=State.COMMITTED
            )
            return Outcome(seconds, self._bulk.sent_bytes)
        if isinstance(answer, Aborted):
            # It has recorded that: proof enough.
            self._journal.move(
                self._start.offer.transaction,
                Side.SOURCE,
                State.ABORTED,
                after=State.COMMITTED,
                reason=answer.reason,
            )
            self._original.put_back()
            raise PeerError(answer.what, answer.reason, answer.remedy)
        raise InDoubt("an answer that makes no sense")

    def conclude(self, resumed: bool) -> Outcome:
        """After InDoubt: what the destination has recorded, once that is known.

        :raises PeerError: it was given up there; the tree runs on here.
        """
        self._journal.move(
            self._start.offer.transaction,
            Side.SOURCE,
            State.RESUMED if resumed else State.ABORTED,
            after=State.COMMITTED,
            reason="" if resumed else "the destination has recorded ABORTED",
        )
        if resumed:
            return Outcome(0.0, 0)
        self._original.put_back()
        raise PeerError(f"host {self._start.destination}", "gave the migration up")

    def _expect(self, kind: type[Prepared] | type[Ready], seconds: float) -> None:
        answer = self._bulk.receive_message(seconds)
        if isinstance(answer, Aborted):
            raise PeerError(answer.what, answer.reason, answer.remedy)
        if not isinstance(answer, kind):
            raise PeerError(f"host {self._bulk.peer}", "it breaks the protocol of migrations")

    @contextmanager
    def _dumper(self, call: CriuCall, images: Path) -> Iterator[socket.socket]:
        """A criu that has done everything but look at the tree; yields our end of its page server."""
        await_worker(self._reactor, call, PREPARE_SECONDS)
        ours, theirs = page_sockets()
        images_fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        criu = 0
        try:
            with ours, theirs:
                criu = spawn_swrk(call.criu_end, [theirs.fileno()], self._original.enter)
                call.begin(
                    DumpRequest(
                        pid=self._original.pid,
                        images_fd=images_fd,
                        page_server_fd=theirs.fileno(),
                        freeze_cgroup=str(self._original.cgroup.path),
                        ghost_limit_bytes=self._start.ghost_limit_bytes,
                        shell_job=self._original.shell_job,
                        log_path=str(images / "dump.log"),
                        external=self._original.terminal_keys,
                    )
                )
                theirs.close()
                event = next_event(self._reactor, call, PREPARE_SECONDS)
                if isinstance(event, Done):
                    raise CriuError("criu", event.reason)
                yield ours
        except BaseException:
            if criu:
                os.kill(criu, signal.SIGKILL)
            raise
        finally:
            os.close(images_fd)
            if criu:
                os.waitpid(criu, 0)

    def _dump(self, call: CriuCall, images: Path, pages: socket.socket, known: KnownPages) -> None:
        self._freeze()
        # Before criu holds it: a traced tree would not look as it is.
        self._progress("frozen")
        reach("source-frozen")
        described = self._original.describe()
        self._progress("described")
        call.proceed()
        pump_pages(
            self._reactor,
            call,
            pages,
            self._bulk,
            known,
            self._patience,
            lambda: self._progress("memory"),
        )
        self._progress("dumped")
        reach("source-dumped")
        self._send_images(images, described)
        self._progress("sent")

    def _freeze(self) -> None:
        """Let the tree stand still, but not between vfork and execve."""
        cgroup = self._original.cgroup
        deadline = time.monotonic() + self._patience
        while True:
            self._frozen_at = time.monotonic()
            cgroup.freeze()
            if not wait_frozen(self._reactor, cgroup, self._patience):
                raise HostError("cgroup", "the tree does not freeze", "try again")
            if not amid_vfork(self._original.proc_fd, cgroup.pids()):
                return
            if time.monotonic() > deadline:
                raise UserError(
                    f"pid {self._original.pid}",
                    "it is always just starting a program (vfork)",
                    "try again when that runs",
                )
            cgroup.thaw()
            # No event tells that the child has executed its program.
            wait_until(self._reactor, lambda: False, VFORK_SECONDS)

    def _send_images(self, images: Path, described: Dumped) -> None:
        for path in sorted(images.iterdir()):
            if path.suffix == ".img" and path.name != "stats-dump":
                self._bulk.send_image(path.name, path.read_bytes())
        self._bulk.send_message(described)


def failure_words(error: BaseException) -> tuple[str, str, str]:
    """What, reason and remedy of any error, for a Failed or Aborted message."""
    if isinstance(error, MigrateError):
        return error.what, error.reason, error.remedy
    return "migration", f"internal error: {error!r}", "see the log of migd"
