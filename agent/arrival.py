"""The destination's side of a migration: images in, restored and frozen, committed or given up.

Sequential code that lets the reactor turn while it waits: the home view, which CRIU needs, is served by the same
process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agent import syscalls
from agent.bulk import IMAGE, PAGES, Bulk, parse_image
from agent.capsule import Capsule
from agent.cgroups import Cgroup, guest_path
from agent.faults import reach
from agent.identity import take_identity
from agent.journal import Journal, Side, State
from agent.link import Commit, Dumped, Offer, Prepared, Ready, Resumed, StreamPipe
from agent.reactor import Reactor
from agent.session import spawn_in_session
from agent.waiting import await_worker, next_event, wait_frozen
from criu_hooks.calls import CriuCall, Done, InheritFd, RestoreRequest, spawn_swrk
from criu_hooks.pages import PageImageWriter, PageStreamError
from migrate.errors import CriuError, HostError, PeerError

log = logging.getLogger(__name__)

IMAGE_WAIT_SECONDS = 60.0
WORKER_SECONDS = 20.0
MAX_IMAGE_BYTES = 1 << 26
LOG_DIR = Path("/var/log")


@dataclass
class GuestPipe:
    """A pipe of the guest that leads home, and our end of it."""

    listed: StreamPipe
    our_fd: int


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
    ) -> None:
        self._reactor = reactor
        self._journal = journal
        self._offer = offer
        self._bulk = bulk
        self._capsule = capsule
        self._images = images
        self._tree = Cgroup(guest_path("keeper", offer.guest, "tree"))
        self._criu = 0

    def run(self, call: CriuCall, before_ready: Callable[[Arrived], None]) -> Arrived:
        """Receive, restore, and let it run once the source has committed.

        :param before_ready: is called before the source may commit: streams must be open by then.
        :raises MigrateError: nothing of it will ever run here; the caller records and says so.
        """
        self._tree.create()
        await_worker(self._reactor, call, WORKER_SECONDS)
        reach("destination-prepared")
        self._bulk.send_message(Prepared())
        dumped = self._receive_images()
        images_at = time.monotonic()
        reach("destination-received")
        arrived = self._restore(call, dumped)
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
        self._tree.thaw()
        reach("destination-thawed")
        log.info(
            "%s: restored in %.1f ms, thawed %.1f ms later",
            self._offer.transaction,
            (restored_at - images_at) * 1000,
            (time.monotonic() - restored_at) * 1000,
        )
        with contextlib.suppress(PeerError):
            self._bulk.send_message(Resumed())
        return arrived

    def _receive_images(self) -> Dumped:
        directory_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            pages = PageImageWriter(directory_fd)
            names: set[str] = set()
            patience = IMAGE_WAIT_SECONDS
            while True:
                kind, frame = self._bulk.receive(patience)
                patience = self._offer.freeze_limit_seconds
                if kind == PAGES:
                    pages.write(memoryview(frame))
                elif kind == IMAGE:
                    name, contents = parse_image(frame)
                    if name in names or len(contents) > MAX_IMAGE_BYTES:
                        raise PeerError("image", f"{name} comes twice or is too large")
                    names.add(name)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                    with open(os.open(name, flags, 0o600, dir_fd=directory_fd), "wb") as file:
                        file.write(contents)
                else:
                    message = self._bulk.decode(frame)
                    if isinstance(message, Dumped) and pages.finished:
                        return message
                    raise PeerError(
                        f"host {self._bulk.peer}", "it breaks the protocol of migrations"
                    )
        except PageStreamError as error:
            raise PeerError(
                f"host {self._bulk.peer}", f"its pages make no sense: {error}"
            ) from None
        finally:
            os.close(directory_fd)

    def _restore(self, call: CriuCall, dumped: Dumped) -> Arrived:
        images_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        holders: tuple[int, ...] = ()
        inherited: dict[str, int] = {}
        arrived = Arrived(0, dumped)
        try:
            for listed in dumped.pipes:
                pipe, guest_fd = self._make_pipe(listed)
                arrived.pipes.append(pipe)
                inherited[listed.key] = guest_fd
            self._avoid_pids()
            keep = list(inherited.values())
            criu_end = call.criu_end
            self._criu, holders = spawn_in_session(
                self._offer.ids,
                lambda fork: spawn_swrk(criu_end, keep, self._enter, fork),
                self._reactor,
            )
            arrived.criu = self._criu
            call.begin(
                RestoreRequest(
                    images_fd=images_fd,
                    uid=self._offer.owner.uid,
                    gids=(self._offer.owner.gid, *self._offer.owner.groups),
                    inherit_fds=tuple(InheritFd(key, fd) for key, fd in inherited.items()),
                    shell_job=self._offer.ids.sid != self._offer.ids.pid,
                    log_path=str(self._images / "restore.log"),
                )
            )
            self._follow(call)
        finally:
            for fd in (images_fd, *inherited.values()):
                os.close(fd)
            for holder in holders:
                os.kill(holder, signal.SIGKILL)
                os.waitpid(holder, 0)
        if not wait_frozen(self._reactor, self._tree, self._offer.freeze_limit_seconds):
            raise HostError("cgroup", "the restored tree did not freeze")
        arrived.files = self._copy_files(dumped)
        return arrived

    def _make_pipe(self, listed: StreamPipe) -> tuple[GuestPipe, int]:
        reading, writing = os.pipe()
        with contextlib.suppress(OSError):
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, listed.size_bytes)
        # criu opens its end again through /proc, as the owner's process could
        os.fchown(reading, self._offer.owner.uid, self._offer.owner.gid)
        if listed.outgoing:
            return GuestPipe(listed, reading), writing
        return GuestPipe(listed, writing), reading

    def _avoid_pids(self) -> None:
        """Have criu born under a pid that the images do not need (they are named after pids)."""
        taken = {
            int(number)
            for path in self._images.iterdir()
            if (number := path.stem.rpartition("-")[2]).isdecimal()
        }
        base = next(n for n in range(300, 30000, 100) if not taken & set(range(n, n + 64)))
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(base))

    def _enter(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        self._tree.add(0)
        self._capsule.enter()
        take_identity(self._offer.owner.uid, self._offer.owner.gid)

    def _follow(self, call: CriuCall) -> None:
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
                Cgroup(guest_path("keeper", self._offer.guest, "own")).add(self._criu)
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
