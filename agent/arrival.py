"""The destination's side of a migration: images in, restored and frozen, committed or given up.

Sequential code that lets the reactor turn while it waits: the home view, which CRIU needs, is served by the same
process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent import syscalls
from agent.bulk import IMAGE, PAGES, Bulk, parse_image
from agent.capsule import Capsule
from agent.cgroups import Cgroup, QuickMoves, guest_path
from agent.faults import reach
from agent.identity import take_identity
from agent.journal import Journal, Side, State
from agent.link import (
    Commit,
    Dumped,
    Offer,
    Planned,
    Prepared,
    Ready,
    Resumed,
    TerminalState,
)
from agent.reactor import Reactor
from agent.restorer import GuestPipe, Restorer
from agent.terminal import TERMINAL_SIGNALS, FarTerminal
from agent.waiting import await_worker, next_event, wait_frozen
from criu_hooks.calls import CriuCall, Done, RestoreRequest
from criu_hooks.pages import PageImageWriter, PageStreamError
from criu_hooks.urgency import urgent
from migrate.errors import CriuError, HostError, PeerError

log = logging.getLogger(__name__)

IMAGE_WAIT_SECONDS = 60.0
WORKER_SECONDS = 20.0
MAX_IMAGE_BYTES = 1 << 26
PARENT = "parent"
"""Where CRIU looks for what an incremental dump leaves out (CR_PARENT_LINK)."""
LOG_DIR = Path("/var/log")


@dataclass
class Arrived:
    """What the keeper of a restored guest must look after."""

    criu: int
    dumped: Dumped
    pipes: list[GuestPipe] = field(default_factory=list)
    files: dict[int, int] = field(default_factory=dict)
    """stdio descriptor of the root → our copy, which knows the offset"""


class Arrival:
    """One attempt to receive one guest, in a capsule that stands."""

    def __init__(
        self,
        reactor: Reactor,
        journal: Journal,
        offer: Offer,
        bulk: Bulk,
        capsule: Capsule,
        images: Path,
        terminal: FarTerminal | None = None,
        view_device: int = 0,
    ) -> None:
        """:param view_device: of the home view, as st_dev; 0: there is none."""
        self._reactor = reactor
        self._journal = journal
        self._offer = offer
        self._bulk = bulk
        self._capsule = capsule
        self._images = images
        self._terminal = terminal
        self._view_device = view_device
        self._tree = Cgroup(guest_path("keeper", offer.guest, "tree"))
        self._own = Cgroup(guest_path("keeper", offer.guest, "own"))
        self._received_at = 0.0

    def run(
        self,
        call: CriuCall,
        before_ready: Callable[[Arrived], None],
        let_run: Callable[[], None],
    ) -> Arrived:
        """Receive, restore, and let it run once the source has committed.

        :param before_ready: is called before the source may commit: streams must be open by then.
        :param let_run: thaws the tree.
        :raises MigrateError: nothing of it will ever run here; the caller records and says so.
        """
        with urgent():
            return self._run(call, before_ready, let_run)

    def _run(
        self,
        call: CriuCall,
        before_ready: Callable[[Arrived], None],
        let_run: Callable[[], None],
    ) -> Arrived:
        self._tree.create()
        await_worker(self._reactor, call, WORKER_SECONDS)
        arrived = self._receive_and_restore(call)
        restored_at = time.monotonic()
        before_ready(arrived)
        reach("destination-restored")
        self._bulk.send_message(Ready())
        answer = self._bulk.receive_message(self._offer.freeze_limit_seconds)
        reach("destination-commit")
        if not isinstance(answer, Commit):
            raise PeerError(f"host {self._offer.source}", "it breaks the protocol of migrations")
        if not self._journal.move(
            self._offer.transaction, Side.DESTINATION, State.RESUMED, after=State.OFFERED
        ):
            raise HostError("journal", "the migration was given up meanwhile")
        reach("destination-recorded")
        let_run()
        reach("destination-thawed")
        log.info(
            "%s: restored in %.1f ms, thawed %.1f ms later",
            self._offer.transaction,
            (restored_at - self._received_at) * 1000,
            (time.monotonic() - restored_at) * 1000,
        )
        with contextlib.suppress(PeerError):
            self._bulk.send_message(Resumed())
        reach("destination-resumed")
        return arrived

    def _receive_images(self) -> Dumped:
        """First what was sent ahead, which becomes the images' parent; then the images."""
        (self._images / PARENT).mkdir(mode=0o700)
        with _directory(self._images) as images_fd, _directory(self._images / PARENT) as ahead_fd:
            ahead, pages = PageImageWriter(ahead_fd), PageImageWriter(images_fd)
            try:
                dumped = self._receive_frames(images_fd, ahead, pages)
            except PageStreamError as error:
                raise PeerError(
                    f"host {self._bulk.peer}", f"its pages make no sense: {error}"
                ) from None
        with contextlib.suppress(OSError):  # empty if nothing was sent ahead; then CRIU is faster
            (self._images / PARENT).rmdir()
        return dumped

    def _receive_frames(
        self, images_fd: int, ahead: PageImageWriter, pages: PageImageWriter
    ) -> Dumped:
        names: set[str] = set()
        while True:
            kind, frame = self._bulk.receive(self._offer.freeze_limit_seconds)
            if kind == PAGES:
                (pages if ahead.finished else ahead).write(memoryview(frame))
            elif kind == IMAGE:
                name, contents = parse_image(frame)
                if name in names or len(contents) > MAX_IMAGE_BYTES:
                    raise PeerError("image", f"{name} comes twice or is too large")
                names.add(name)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with open(os.open(name, flags, 0o600, dir_fd=images_fd), "wb") as file:
                    file.write(contents)
            else:
                message = self._bulk.decode(frame)
                if isinstance(message, Dumped) and pages.finished:
                    return message
                raise PeerError(f"host {self._bulk.peer}", "it breaks the protocol of migrations")

    def _receive_and_restore(self, call: CriuCall) -> Arrived:
        plan = self._bulk.receive_message(self._offer.freeze_limit_seconds)
        if not isinstance(plan, Planned):
            raise PeerError(f"host {self._offer.source}", "it breaks the protocol of migrations")
        with self._restorer(call, plan) as restorer:
            reach("destination-prepared")
            self._bulk.send_message(Prepared())
            self._bulk.await_frame(IMAGE_WAIT_SECONDS)
            with QuickMoves(self._own):
                dumped = self._receive_images()
                self._received_at = time.monotonic()
                reach("destination-received")
                tids = self._tids_in_images()
                if restorer.suits(dumped.pipes, tids):
                    return self._restore(call, restorer, dumped)
            log.info("%s: not what was planned", self._offer.transaction)
            restorer.discard()
        with self._restorer(call, Planned(dumped.pipes, tids)) as restorer:
            return self._restore(call, restorer, dumped)

    def _restorer(self, call: CriuCall, plan: Planned) -> Restorer:
        return Restorer(
            self._reactor,
            call,
            self._offer.ids,
            self._offer.owner,
            self._enter,
            plan.pipes,
            plan.tids,
            self._terminal,
            self._offer.terminal is not None and self._offer.terminal.controlling,
        )

    def _tids_in_images(self) -> tuple[int, ...]:
        """Images are named after the tasks they are of."""
        names = (path.stem.rpartition("-")[2] for path in self._images.iterdir())
        return tuple(int(number) for number in names if number.isdecimal())

    def _restore(self, call: CriuCall, restorer: Restorer, dumped: Dumped) -> Arrived:
        restorer.set_sizes(dumped.pipes)
        images_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        terminal = dumped.terminal or TerminalState()
        ids = self._offer.ids
        try:
            call.begin(
                RestoreRequest(
                    images_fd=images_fd,
                    uid=self._offer.owner.uid,
                    gids=(self._offer.owner.gid, *self._offer.owner.groups),
                    mounts_fd=self._capsule.mount_fd,
                    inherit_fds=restorer.inherited(terminal.keys),
                    shell_job=ids.sid != ids.pid,
                    log_path=str(self._images / "restore.log"),
                    view=self._offer.view,
                    view_device=self._view_device,
                    session_leader=ids.pid if ids.sid == ids.pid else 0,
                    foreground=terminal.foreground,
                )
            )
            self._follow(call, restorer)
        finally:
            os.close(images_fd)
        if not wait_frozen(self._reactor, self._tree, self._offer.freeze_limit_seconds):
            raise HostError("cgroup", "the restored tree did not freeze")
        if self._terminal is not None:
            self._terminal.restore(terminal)
        return Arrived(restorer.pid, dumped, restorer.pipes, self._copy_files(dumped))

    def _enter(self) -> None:
        signal.set_wakeup_fd(-1)
        for ignored in (signal.SIGCHLD, signal.SIGPIPE, *TERMINAL_SIGNALS):
            signal.signal(ignored, signal.SIG_DFL)
        self._tree.add(0)
        self._capsule.enter()
        take_identity(self._offer.owner.uid, self._offer.owner.gid)

    def _follow(self, call: CriuCall, restorer: Restorer) -> None:
        """Answer criu; at pre-resume take criu itself out of the tree's cgroup, and freeze that."""
        while True:
            event = next_event(self._reactor, call, self._offer.freeze_limit_seconds)
            if isinstance(event, Done):
                if not event.ok:
                    self._keep_log()
                    raise CriuError(f"pid {self._offer.ids.pid}", event.reason)
                return
            if event.script == "pre-resume":
                reach("destination-criu")
                restorer.leave(self._own)
                self._tree.freeze()
            call.proceed()

    def _keep_log(self) -> None:
        """CRIU's log of a failed restore stays for the administrator."""
        with contextlib.suppress(OSError):
            text = (self._images / "restore.log").read_bytes()
            name = f"migrate-restore-{self._offer.transaction}.log"
            (LOG_DIR / name).write_bytes(text)

    def _copy_files(self, dumped: Dumped) -> dict[int, int]:
        if not dumped.files:
            return {}
        pidfd = os.pidfd_open(self._offer.ids.pid)
        try:
            if not set(dumped.files) <= {0, 1, 2}:
                raise PeerError("descriptor", "not one of stdio")
            return {number: syscalls.pidfd_getfd(pidfd, number) for number in dumped.files}
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
