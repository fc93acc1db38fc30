"""The keeper's inner process: receives a guest, is its parent, and hands it on.

Everything is sequential code that lets the reactor turn while it waits: the home view, which CRIU and the guest
need, is served by the same process.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from agent import capsule, guestwords, syscalls
from agent.bulk import IMAGE, PAGES, Bulk, parse_image
from agent.cgroups import Cgroup, guest_path
from agent.departure import failure_words
from agent.endpoints import Duplex, FdSource, MeteredSink
from agent.home_view import HomeView
from agent.identity import take_identity
from agent.journal import Journal, Side, State
from agent.lifeline import Lifeline
from agent.link import (
    Aborted,
    Attach,
    Commit,
    Dumped,
    EndGuest,
    Link,
    Offer,
    Prepared,
    Ready,
    Resumed,
    StreamPipe,
)
from agent.reactor import READ, Reactor
from agent.session import spawn_in_session
from agent.view_server import VIEW_WINDOW
from agent.waiting import next_event, wait_until
from criu_hooks.calls import CriuCall, Done, InheritFd, RestoreRequest, spawn_swrk
from criu_hooks.pages import PageImageWriter
from migrate.errors import CriuError, HostError, MigrateError, PeerError

log = logging.getLogger(__name__)

ATTACH_SECONDS = 20.0
VIEW_SECONDS = 20.0
IMAGE_WAIT_SECONDS = 60.0
MAX_IMAGE_BYTES = 1 << 26
END_POLL_SECONDS = 0.005


@dataclass
class _Pipe:
    """A pipe of the guest that leads home: the guest's end, until criu has it, and ours."""

    listed: StreamPipe
    guest_fd: int
    our_fd: int


class GuestHost:
    """See the module."""

    def __init__(
        self,
        offer: Offer,
        link: Link,
        server: socket.socket,
        view: HomeView | None,
        images: Path,
        call: CriuCall,
    ) -> None:
        self._call = call
        self._offer = offer
        self._guest = offer.guest
        self._links = [link]
        self._server = server
        self._view = view
        self._images = images
        self._reactor = Reactor()
        self._journal = Journal()
        self._tree = Cgroup(guest_path("keeper", offer.guest, "tree"))
        self._bulk: Bulk | None = None
        self._lifeline: Lifeline | None = None
        self._duplex: Duplex | None = None
        self._capsule: capsule.Capsule | None = None
        self._sources: list[FdSource] = []
        self._sinks: list[MeteredSink] = []
        self._files: dict[int, int] = {}
        self._exit_code: int | None = None
        self._told_end = False
        self._finished = False
        self._hold = -1
        self._frozen_for_cut = False
        self._criu = 0
        self._children: dict[int, int] = {}
        """exit status of children that were reaped"""

    def run(self) -> None:
        """Receive the guest, keep it, until it has ended."""
        self._watch_children()
        self._reactor.register(self._server.fileno(), READ, lambda _: self._accept())
        first = self._links[0]
        self._reactor.register(first.fileno(), READ, lambda _: self._packet(first))
        with self._call:
            try:
                self._receive(self._call)
            except Exception as error:
                if not isinstance(error, MigrateError):
                    log.exception("%s: arrival failed", self._offer.transaction)
                self._abort(error)
                return
        while not self._finished:
            self._reactor.turn()
        self._close()

    # ------------------------------------------------------------------ arrival

    def _receive(self, call: CriuCall) -> None:
        if not wait_until(
            self._reactor, lambda: self._bulk is not None and self._lifeline_up(), ATTACH_SECONDS
        ):
            raise PeerError(f"host {self._offer.source}", "did not connect in time")
        assert self._bulk is not None
        self._await_view()
        self._capsule = capsule.build(
            self._reactor,
            self._offer.hostname,
            self._view.mountpoint if self._view else None,
            self._offer.view,
        )
        self._tree.create()
        self._bulk.send_message(Prepared())
        dumped = self._receive_images(self._bulk)
        pipes = self._make_pipes(dumped)
        self._restore(call, pipes)
        self._open_files(dumped)
        self._open_streams(pipes)
        self._bulk.send_message(Ready())
        answer = self._bulk.receive_message(self._offer.freeze_limit_seconds)
        if not isinstance(answer, Commit):
            raise PeerError(f"host {self._offer.source}", "it breaks the protocol of migrations")
        if not self._journal.move(
            self._offer.transaction, Side.DESTINATION, State.RESUMED, after=State.OFFERED
        ):
            raise HostError("journal", "the migration was given up meanwhile")
        self._tree.thaw()
        with contextlib.suppress(PeerError):
            self._bulk.send_message(Resumed())
        self._start_sources(pipes)
        self._to_guard(guestwords.Started(self._offer.epoch))
        self._bulk.close()
        self._bulk = None
        self._remove_images()
        log.info("%s: %s resumed here", self._offer.transaction, self._guest)

    def _lifeline_up(self) -> bool:
        return self._lifeline is not None and self._lifeline.up

    def _await_view(self) -> None:
        view = self._view
        if view is None:
            return
        with open("/proc/self/mountinfo") as mountinfo:
            self._reactor.register(mountinfo.fileno(), select.EPOLLPRI, lambda _: None)
            try:
                if not wait_until(self._reactor, lambda: view.mounted(), VIEW_SECONDS):
                    raise HostError("home view", "could not be mounted in time")
            finally:
                self._reactor.unregister(mountinfo.fileno())

    def _receive_images(self, bulk: Bulk) -> Dumped:
        directory_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            pages = PageImageWriter(directory_fd)
            names: set[str] = set()
            patience = IMAGE_WAIT_SECONDS
            while True:
                kind, frame = bulk.receive(patience)
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
                    message = bulk.decode(frame)
                    if isinstance(message, Dumped) and pages.finished:
                        return message
                    raise PeerError(f"host {bulk.peer}", "it breaks the protocol of migrations")
        finally:
            os.close(directory_fd)

    def _make_pipes(self, dumped: Dumped) -> list[_Pipe]:
        pipes = []
        for listed in dumped.pipes:
            reading, writing = os.pipe()
            with contextlib.suppress(OSError):
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, listed.size_bytes)
            owner = self._offer.owner
            # criu opens its end again through /proc, as the owner's process could
            os.fchown(reading, owner.uid, owner.gid)
            if listed.outgoing:
                pipes.append(_Pipe(listed, writing, reading))
            else:
                pipes.append(_Pipe(listed, reading, writing))
        return pipes

    def _restore(self, call: CriuCall, pipes: list[_Pipe]) -> None:
        images_fd = os.open(self._images, os.O_RDONLY | os.O_DIRECTORY)
        holders: tuple[int, ...] = ()
        try:
            self._avoid_pids()
            keep = [pipe.guest_fd for pipe in pipes]
            criu_end = call.criu_end
            self._criu, holders = spawn_in_session(
                self._offer.ids,
                lambda fork: spawn_swrk(criu_end, keep, self._enter, fork),
                self._reactor,
            )
            call.begin(
                RestoreRequest(
                    images_fd=images_fd,
                    inherit_fds=tuple(InheritFd(p.listed.key, p.guest_fd) for p in pipes),
                    shell_job=self._shell_job,
                    log_path=str(self._images / "restore.log"),
                )
            )
            self._follow(call)
        finally:
            os.close(images_fd)
            for holder in holders:
                os.kill(holder, signal.SIGKILL)
                os.waitpid(holder, 0)
        for pipe in pipes:
            os.close(pipe.guest_fd)
        if not self._tree.wait_frozen(self._offer.freeze_limit_seconds):
            raise HostError("cgroup", "the restored tree did not freeze")

    @property
    def _shell_job(self) -> bool:
        return self._offer.ids.sid != self._offer.ids.pid

    def _avoid_pids(self) -> None:
        """Have criu born under a pid that the images do not need (they are named after their pids)."""
        taken = {
            int(number)
            for path in self._images.iterdir()
            if (number := path.stem.rpartition("-")[2]).isdecimal()
        }
        base = next(n for n in range(300, 30000, 100) if not taken & set(range(n, n + 64)))
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(base))

    def _enter(self) -> None:
        assert self._capsule is not None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._tree.add(0)
        self._capsule.enter()
        take_identity(self._offer.owner.uid, self._offer.owner.gid)

    def _follow(self, call: CriuCall) -> None:
        """Answer criu; at pre-resume take criu itself out of the tree's cgroup and freeze the tree."""
        while True:
            event = next_event(self._reactor, call, self._offer.freeze_limit_seconds)
            if isinstance(event, Done):
                if not event.ok:
                    self._keep_log()
                    raise CriuError(f"pid {self._offer.ids.pid}", event.reason)
                return
            if event.script == "pre-resume":
                Cgroup(guest_path("keeper", self._guest, "own")).add(self._criu)
                self._tree.freeze()
            call.proceed()

    def _keep_log(self) -> None:
        """CRIU's log of a failed restore stays for the administrator."""
        with contextlib.suppress(OSError):
            text = (self._images / "restore.log").read_bytes()
            target = Path("/var/log") / f"migrate-restore-{self._offer.transaction}.log"
            target.write_bytes(text)

    def _open_files(self, dumped: Dumped) -> None:
        if not dumped.files:
            return
        pidfd = os.pidfd_open(self._offer.ids.pid)
        try:
            for number in dumped.files:
                if number not in (0, 1, 2):
                    raise PeerError("descriptor", f"{number} is not stdio")
                self._files[number] = syscalls.pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)

    def _open_streams(self, pipes: list[_Pipe]) -> None:
        assert self._lifeline is not None
        for pipe in pipes:
            stream = self._lifeline.open(pipe.listed.stream)
            if not pipe.listed.outgoing:
                self._sinks.append(MeteredSink(self._reactor, stream.receiver, pipe.our_fd))

    def _start_sources(self, pipes: list[_Pipe]) -> None:
        assert self._lifeline is not None
        for pipe in pipes:
            if pipe.listed.outgoing:
                stream = self._lifeline.open(pipe.listed.stream)
                self._sources.append(
                    FdSource(self._reactor, stream.sender, pipe.our_fd, private=True)
                )

    def _remove_images(self) -> None:
        for path in self._images.iterdir():
            path.unlink()

    def _abort(self, error: BaseException) -> None:
        """It will never run here: recorded first, then said."""
        what, reason, remedy = failure_words(error)
        log.info("%s: given up: %s", self._offer.transaction, error)
        self._tree.kill()
        self._journal.move(
            self._offer.transaction,
            Side.DESTINATION,
            State.ABORTED,
            after=State.OFFERED,
            reason=reason,
        )
        if self._bulk is not None:
            with contextlib.suppress(PeerError):
                self._bulk.send_message(Aborted(what, reason, remedy))
            self._bulk.close()
        self._tree.thaw()

    # ------------------------------------------------------------------ the guest's parent

    def _watch_children(self) -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

        def child(events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(reading, 4096)
            self._reap()

        self._reactor.register(reading, READ, child)

    def _reap(self) -> None:
        root = self._offer.ids.pid
        for pid in (self._criu, root):
            while pid:
                try:
                    found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
                except ChildProcessError:
                    break
                if not found:
                    break
                if pid == self._criu:
                    self._criu = 0
                    break
                self._changed(status)
        if os.getpid() == 1:
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """As the capsule's init: what the guest left behind, but not our own helpers."""
        with contextlib.suppress(ChildProcessError):
            for pid in self._tree.pids():
                os.waitpid(pid, os.WNOHANG)

    def _changed(self, status: int) -> None:
        if os.WIFSTOPPED(status):
            self._to_guard(guestwords.Stopped(os.WSTOPSIG(status), self._offsets()))
        elif os.WIFCONTINUED(status):
            self._to_guard(guestwords.Continued())
        else:
            self._exit_code = os.waitstatus_to_exitcode(status)
            log.info("%s: ended (%d)", self._guest, self._exit_code)
            self._tell_end()

    def _offsets(self) -> tuple[tuple[int, int], ...]:
        return tuple((number, os.lseek(fd, 0, os.SEEK_CUR)) for number, fd in self._files.items())

    def _tell_end(self) -> None:
        """Tell the end once all output is at home: the deputy must not end before its last word."""
        if self._exit_code is None or self._told_end or self._lifeline is None:
            return
        for source in self._sources:
            source.drain()
        for sink in self._sinks:
            sink.settle()
        senders = [
            stream.sender
            for number, stream in self._lifeline.mux.streams.items()
            if number >= guestwords.FIRST_PIPE_STREAM
        ]
        if any(not sender.reset and sender.acked < sender.end for sender in senders):
            self._reactor.call_later(END_POLL_SECONDS, self._tell_end)
            return
        self._told_end = True
        self._to_guard(guestwords.Ended(self._exit_code, self._offsets()))
        self._journal.move(
            self._offer.transaction, Side.DESTINATION, State.ENDED, after=State.RESUMED
        )
        self._await_farewell()

    def _await_farewell(self) -> None:
        """Leave when home has heard the end."""
        assert self._lifeline is not None
        control = self._lifeline.mux.streams[0].sender

        def acked() -> None:
            if control.acked == control.end:
                self._finished = True

        control.on_ack = acked

    # ------------------------------------------------------------------ home and migd

    def _to_guard(self, word: guestwords.ToGuard) -> None:
        if self._lifeline is not None:
            self._lifeline.send_message(guestwords.encode(word))

    def _heard(self, message: bytes) -> None:
        root = self._offer.ids.pid
        match guestwords.decode_for_keeper(message):
            case guestwords.Signal(number, value):
                if self._exit_code is not None or not 1 <= number <= 64:
                    return
                with contextlib.suppress(ProcessLookupError):
                    if value is None:
                        os.kill(root, number)
                    else:
                        syscalls.queue_signal(root, number, value)
            case guestwords.Kill():
                self._tree.kill()

    def _cut(self, reason: PeerError) -> None:
        """Cut off is not dead, but an orphan must not run on for ever unseen (invariant 7)."""
        log.warning("%s: lifeline: %s", self._guest, reason)
        self._reactor.call_later(self._offer.cut_freeze_seconds, self._freeze_if_cut)

    def _freeze_if_cut(self) -> None:
        if not self._lifeline_up() and self._exit_code is None:
            log.warning("%s: frozen, home is silent", self._guest)
            self._frozen_for_cut = True
            self._tree.freeze()

    def _lifeline_came(self) -> None:
        if self._frozen_for_cut:
            self._frozen_for_cut = False
            self._tree.thaw()

    def _attach_lifeline(self, fd_in: int, fd_out: int, hold: int) -> None:
        if self._lifeline is None:
            self._lifeline = Lifeline(
                self._reactor,
                self._guest,
                epoch=self._offer.epoch,
                leads=True,
                on_message=self._heard,
                on_up=self._lifeline_came,
                on_down=self._cut,
            )
            if self._view is not None:
                stream = self._lifeline.open(guestwords.VIEW_STREAM, VIEW_WINDOW)
                self._duplex = Duplex(self._reactor, stream, self._view.socket.detach())
        self._lifeline.attach(fd_in, fd_out)
        if self._hold >= 0:
            os.close(self._hold)
        self._hold = hold

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._server.accept()
            link = Link(sock)
            self._links.append(link)
            self._reactor.register(link.fileno(), READ, lambda _: self._packet(link))

    def _packet(self, link: Link) -> None:
        received = link.receive()
        if received is None:
            self._reactor.unregister(link.fileno())
            self._links.remove(link)
            link.close()
            return
        packet, fds = received
        match packet:
            case Attach("bulk") if self._bulk is None and len(fds) == 3:
                self._bulk = Bulk(
                    self._reactor,
                    self._offer.source,
                    fds[0],
                    fds[1],
                    self._offer.freeze_limit_seconds,
                    fds[2],
                )
            case Attach("lifeline") if len(fds) == 3:
                self._attach_lifeline(*fds)
            case EndGuest():
                self._tree.kill()
            case _:
                for fd in fds:
                    os.close(fd)

    def _close(self) -> None:
        for source in self._sources:
            source.close()
        for sink in self._sinks:
            sink.close()
        if self._duplex is not None:
            self._duplex.close()
        if self._lifeline is not None:
            self._lifeline.detach()
        self._journal.close()
