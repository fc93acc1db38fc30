"""The guard: one root process per guest at home, ``python -m agent.guard GUEST`` with migd's link as stdin.

First it is the source of the first migration: it freezes the process, has CRIU dump it, and commits. Then the
frozen original becomes the deputy, and the guard stays as home's end of the lifeline: it holds the process's
pipes, serves the home view, and passes signals, stops and the end between deputy and keeper.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent import guestwords
from agent.bulk import Bulk
from agent.cgroups import Cgroup, dissolve, guest_path, of_process
from agent.departure import Departure, InDoubt, Outcome, failure_words
from agent.deputy_link import (
    Broken,
    Continued,
    DeputyLink,
    DeputyListener,
    Ready,
    Signalled,
    process_state,
)
from agent.endpoints import End, FdSink, PeekSource
from agent.identity import take_identity
from agent.injection import DeputyProgram, MuteDeputy, become_deputy
from agent.journal import Entry, Journal, Side, State
from agent.lifeline import Lifeline
from agent.link import (
    Attach,
    Departed,
    Dumped,
    Ended,
    Failed,
    Link,
    NeedLifeline,
    Progress,
    StartDeparture,
    StreamPipe,
    Verdict,
    listen,
)
from agent.reactor import READ, Reactor
from agent.syscalls import pidfd_getfd
from agent.view_server import ViewServer
from criu_hooks.calls import CriuCall
from criu_hooks.fds import FileKind
from criu_hooks.preflight import examine
from criu_hooks.proc import boot_id, pid_starttime
from criu_hooks.tree import ProcessTree
from migrate import paths
from migrate.errors import MigrateError, PeerError, UserError

log = logging.getLogger(__name__)

STATE_POLL_SECONDS = 0.2
"""A deputy that is stopped by SIGSTOP cannot say so, and the kernel tells only its parent: so we look."""
DEPUTIES_DIR = paths.RUN_DIR / "deputies"
IN_USE_ERRORS = (errno.EBUSY, errno.ENOTEMPTY)


@dataclass
class _HomeFile:
    """A regular file on stdio: home shares the description, so the deputy's side keeps its offset."""

    number: int
    fd: int


class FreshTree:
    """The original of a first migration: a process tree of this host."""

    def __init__(self, start: StartDeparture, on_streams: Callable[[list[int]], None]) -> None:
        """
        :param on_streams: gets the streams that the keeper will use, before it may use them.
        """
        self.pid = start.host_pid
        self._on_streams = on_streams
        self._start = start
        self._owner = start.offer.owner
        self.shell_job = start.offer.ids.sid != self.pid
        self.cgroup = Cgroup(guest_path("guard", start.offer.guest, "tree"))
        self.origin = of_process(self.pid)
        self.pidfd = os.pidfd_open(self.pid)
        if pid_starttime(self.pid) != start.starttime_ticks:
            raise UserError(f"pid {self.pid}", "is another process by now", "look it up with ps")
        self.tree: ProcessTree | None = None
        self.pipes: dict[int, int] = {}
        """stream → our copy of home's descriptor"""
        self.files: list[_HomeFile] = []
        self.pipe_list: tuple[StreamPipe, ...] = ()
        self.stdio: dict[int, list[int]] = {}
        """stream → the root's descriptors, of those that the deputy keeps"""
        self.pending: list[int] = []

    def gather(self) -> None:
        self.cgroup.create()
        known: set[int] = set()
        while True:
            members = [p.pid for p in ProcessTree.capture(self.pid).members]
            if not set(members) - known:
                return
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    self.cgroup.add(pid)
            known.update(members)

    def enter(self) -> None:
        take_identity(self._owner.uid, self._owner.gid)

    def describe(self) -> Dumped:
        tree = ProcessTree.capture(self.pid)
        if tree.root.starttime_ticks != self._start.starttime_ticks:
            raise UserError(f"pid {self.pid}", "is another process by now")
        self.tree = tree
        obstacles = examine(
            tree, self._owner.uid, ghost_limit_bytes=self._start.ghost_limit_bytes, link_remap=True
        )
        if obstacles:
            raise obstacles[0].error()
        self.pending = pending_signals(self.pid)
        self._copy_descriptors(tree)
        return Dumped(pipes=self.pipe_list, files=tuple(file.number for file in self.files))

    def _copy_descriptors(self, tree: ProcessTree) -> None:
        listed: list[StreamPipe] = []
        for stream, pipe in enumerate(tree.external_pipes(), guestwords.FIRST_PIPE_STREAM):
            if pipe.direction == "both":
                raise UserError(
                    f"pid {self.pid}", f"it holds both ends of {pipe.key}, as does somebody else"
                )
            end = pipe.ends[0]
            pidfd = os.pidfd_open(end.pid)
            try:
                fd = pidfd_getfd(pidfd, end.fd)
            finally:
                os.close(pidfd)
            self.pipes[stream] = fd
            for held in pipe.ends:
                if held.pid == self.pid and held.fd <= 2:
                    self.stdio.setdefault(stream, []).append(held.fd)
            size = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            listed.append(StreamPipe(stream, pipe.key, pipe.direction == "out", size))
        self.pipe_list = tuple(listed)
        self._on_streams([pipe.stream for pipe in listed])
        for file in tree.root.files:
            if file.fd <= 2 and file.kind is FileKind.REGULAR:
                self.files.append(_HomeFile(file.fd, pidfd_getfd(self.pidfd, file.fd)))

    def put_back(self) -> None:
        """Undo: everything runs in the cgroup it came from."""
        for fd in (*self.pipes.values(), *(file.fd for file in self.files)):
            os.close(fd)
        self.pipes.clear()
        self.files.clear()
        put_back(self.cgroup, self.origin)


def put_back(cgroup: Cgroup, origin: Path) -> None:
    """Move everything back to the cgroup it came from, and let it run. No error if that is gone."""
    cgroup.thaw()
    while pids := cgroup.pids():
        for pid in pids:
            try:
                Cgroup(origin).add(pid)
            except ProcessLookupError:
                continue
            except OSError:
                return  # its cgroup is gone; it may stay where it is
    with contextlib.suppress(OSError):
        cgroup.remove()
        cgroup.path.parent.rmdir()


class Guard:
    """See the module. `run` returns when the guest is no more (or never left)."""

    def __init__(self, guest: str, link: Link) -> None:
        self._guest = guest
        self._links: list[Link] = [link]
        self._reactor = Reactor()
        self._journal = Journal()
        self._lifeline: Lifeline | None = None
        self._view: ViewServer | None = None
        self._deputy: DeputyLink | None = None
        self._listener: DeputyListener | None = None
        self._mute: MuteDeputy | None = None
        self._start: StartDeparture | None = None
        self._tree: FreshTree | None = None
        self._exit_code: int | None = None
        self._deputy_stopped = False
        self._guest_stopped = 0
        self._verdict: bool | None = None
        self._where = ""
        self._finished = False
        self._deputy_dead = False
        self._closed_fds: set[int] = set()
        self._directory = paths.GUESTS_DIR / f"guard-{guest}"
        self._sinks: list[FdSink] = []
        self._sources: list[PeekSource] = []

    def run(self) -> None:
        """Everything, in order."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with listen(self._directory / "guard.sock") as server:
                self._reactor.register(server.fileno(), READ, lambda _: self._accept(server))
                first = self._links[0].receive()
                if first is None or not isinstance(first[0], StartDeparture):
                    return
                self._reactor.register(
                    self._links[0].fileno(), READ, lambda _: self._packet(self._links[0])
                )
                if self._depart(first[0], first[1]):
                    while not self._finished:
                        self._reactor.turn()
        finally:
            self._give_back()

    # ------------------------------------------------------------------ the first migration

    def _depart(self, start: StartDeparture, fds: list[int]) -> bool:
        self._start = start
        offer = start.offer
        self._where = start.destination
        bulk = Bulk(self._reactor, start.destination, fds[0], fds[1], offer.freeze_limit_seconds)
        try:
            with CriuCall() as call:
                tree = self._tree = FreshTree(start, self._open_streams)
                self._journal.record(self._entry(start, tree))
                self._lifeline = Lifeline(
                    self._reactor,
                    self._guest,
                    leads=False,
                    on_message=self._heard,
                    on_down=self._cut,
                )
                self._view = ViewServer(self._reactor, self._lifeline, offer.owner)
                self._lifeline.attach(fds[2], fds[3])
                images = self._directory / "dump"
                images.mkdir(mode=0o700)
                departure = Departure(self._reactor, self._journal, bulk, start, tree, self._tell)
                try:
                    outcome = departure.run(call, images)
                except InDoubt as doubt:
                    outcome = self._await_verdict(str(doubt), tree)
        except (MigrateError, OSError) as error:
            what, reason, remedy = failure_words(error)
            self._journal.move(
                offer.transaction, Side.SOURCE, State.ABORTED, after=State.BEGUN, reason=reason
            )
            log.info("%s: not moved: %s", offer.transaction, error)
            self._say(Failed(offer.transaction, what, reason, remedy))
            return False
        finally:
            bulk.close()
            shutil.rmtree(self._directory / "dump", ignore_errors=True)
        self._connect_streams(tree)
        self._say(
            Departed(
                offer.transaction,
                start.destination,
                outcome.frozen_seconds * 1000,
                outcome.sent_bytes,
            )
        )
        self._stand_deputy(tree)
        return True

    def _entry(self, start: StartDeparture, tree: FreshTree) -> Entry:
        offer = start.offer
        return Entry(
            transaction=offer.transaction,
            side=Side.SOURCE,
            state=State.BEGUN,
            guest=offer.guest,
            peer=start.destination,
            peer_boot_id=start.destination_boot_id,
            home=offer.home,
            pid=start.host_pid,
            starttime_ticks=start.starttime_ticks,
            user=offer.owner.name,
            uid=offer.owner.uid,
            command=offer.command,
            origin_cgroup=str(tree.origin),
            reason="",
            since=time.time(),
            boot_id=boot_id(),
        )

    def _await_verdict(self, doubt: str, tree: FreshTree) -> Outcome:
        """Committed, and the destination silent: nothing runs here until its record is known."""
        assert self._start is not None
        offer = self._start.offer
        log.warning("%s: in doubt: %s", offer.transaction, doubt)
        self._say(
            Failed(
                offer.transaction,
                f"host {self._start.destination}",
                f"committed, but it has not confirmed ({doubt}); the process waits frozen",
                "it is settled when the host answers, or by `migctl recover`",
                in_doubt=True,
            )
        )
        while self._verdict is None:
            self._reactor.turn()
        if self._verdict:
            self._journal.move(offer.transaction, Side.SOURCE, State.RESUMED, after=State.COMMITTED)
            return Outcome(0.0, 0)
        self._journal.move(
            offer.transaction,
            Side.SOURCE,
            State.ABORTED,
            after=State.COMMITTED,
            reason="the destination has recorded ABORTED",
        )
        tree.put_back()
        raise PeerError(f"host {self._start.destination}", "gave the migration up")

    # ------------------------------------------------------------------ streams and deputy

    def _open_streams(self, numbers: list[int]) -> None:
        assert self._lifeline is not None
        for number in numbers:
            self._lifeline.open(number)

    def _connect_streams(self, tree: FreshTree) -> None:
        assert self._lifeline is not None
        for pipe in tree.pipe_list:
            stream = self._lifeline.open(pipe.stream)
            fd = tree.pipes.pop(pipe.stream)
            kept = tree.stdio.get(pipe.stream, [])

            def over(end: End, kept: list[int] = kept) -> None:
                self._close_at_deputy(kept)

            if pipe.outgoing:
                self._sinks.append(FdSink(self._reactor, stream.receiver, fd, on_end=over))
            else:
                self._sources.append(PeekSource(self._reactor, stream.sender, fd, on_end=over))

    def _close_at_deputy(self, fds: list[int]) -> None:
        """The guest has closed these, or nobody reads them: home's others must see that."""
        self._closed_fds.update(fds)
        if self._deputy is not None:
            for fd in fds:
                self._deputy.close_descriptor(fd)

    def _stand_deputy(self, tree: FreshTree) -> None:
        """The frozen original becomes the deputy, in the cgroup where the original was."""
        assert self._start is not None and tree.tree is not None
        owner = self._start.offer.owner
        DEPUTIES_DIR.mkdir(exist_ok=True)
        DEPUTIES_DIR.chmod(0o711)
        socket_path = DEPUTIES_DIR / self._guest
        self._listener = DeputyListener(socket_path, tree.pid, owner.uid, owner.gid)
        self._reactor.register(self._listener.fileno(), READ, lambda _: self._deputy_knocks())
        members: list[int] = []
        for process in tree.tree.members[1:]:
            with contextlib.suppress(ProcessLookupError):
                members.append(os.pidfd_open(process.pid))
        script = Path(__file__).with_name("deputy.py")
        try:
            deputy = become_deputy(
                tree.pid,
                thaw=tree.cgroup.thaw,
                program=DeputyProgram(Path(os.path.realpath(sys.executable)), script, socket_path),
                members=members,
                keep_fds=sorted({0, 1, 2} | {f.number for f in tree.files}),
                imaged_signals=tree.pending,
            )
        except MigrateError as error:
            log.warning("%s: no deputy: %s", self._guest, error)
            if process_state(tree.pid) not in (None, "Z"):
                raise
            self._to_keeper(guestwords.Kill())  # killed while it was frozen
            put_back(tree.cgroup, tree.origin)
            self._deputy_dead = True
            return
        finally:
            for pidfd in members:
                os.close(pidfd)
        if isinstance(deputy, MuteDeputy):
            self._mute = deputy
            log.warning("%s: mute deputy: %s", self._guest, deputy.reason)
        self._deputy_stopped = deputy.stopped
        put_back(tree.cgroup, tree.origin)
        self._reactor.watch_pid(tree.pid, self._deputy_ended)
        self._watch_state()

    def _deputy_knocks(self) -> None:
        assert self._listener is not None
        link = self._listener.accept()
        if link is None:
            return
        if self._deputy is not None:
            self._drop_deputy()
        self._deputy = link
        self._reactor.register(link.fileno(), READ, lambda _: self._deputy_says())

    def _drop_deputy(self) -> None:
        if self._deputy is not None:
            self._reactor.unregister(self._deputy.fileno())
            self._deputy.close()
            self._deputy = None

    def _deputy_says(self) -> None:
        assert self._deputy is not None
        for report in self._deputy.receive():
            match report:
                case Ready():
                    for fd in sorted(self._closed_fds):
                        self._deputy.close_descriptor(fd)
                    if self._exit_code is not None:
                        self._deputy.end(self._exit_code)
                    elif self._guest_stopped:
                        self._deputy.stop(self._guest_stopped)
                case Signalled(number, value):
                    self._to_keeper(guestwords.Signal(number, value))
                case Continued():
                    self._guest_stopped = 0
                    self._to_keeper(guestwords.Signal(signal.SIGCONT))
                case Broken():
                    self._drop_deputy()
                    return

    def _watch_state(self) -> None:
        if self._tree is None or self._exit_code is not None:
            return
        stopped = process_state(self._tree.pid) == "T"
        if stopped and not self._deputy_stopped and not self._guest_stopped:
            self._to_keeper(guestwords.Signal(signal.SIGSTOP))
        self._deputy_stopped = stopped
        self._reactor.call_later(STATE_POLL_SECONDS, self._watch_state)

    def _deputy_ended(self) -> None:
        """By our word, or killed: then its guest is killed as well."""
        if self._exit_code is None:
            log.info("%s: the deputy was killed", self._guest)
            self._to_keeper(guestwords.Kill())
        else:
            self._finished = True

    # ------------------------------------------------------------------ the keeper

    def _to_keeper(self, word: guestwords.ToKeeper) -> None:
        if self._lifeline is not None:
            self._lifeline.send_message(guestwords.encode(word))

    def _heard(self, message: bytes) -> None:
        match guestwords.decode_for_guard(message):
            case guestwords.Stopped(number, offsets):
                self._set_offsets(offsets)
                self._guest_stopped = number
                if self._deputy is not None and not self._deputy_stopped:
                    self._deputy.stop(number)
            case guestwords.Continued():
                self._guest_stopped = 0
            case guestwords.Ended(exit_code, offsets):
                log.info("%s: ended (%d)", self._guest, exit_code)
                self._set_offsets(offsets)
                self._exit_code = exit_code
                self._end_deputy()
            case guestwords.Started():
                pass

    def _set_offsets(self, offsets: tuple[tuple[int, int], ...]) -> None:
        if self._tree is None:
            return
        positions = dict(offsets)
        for file in self._tree.files:
            if file.number in positions:
                os.lseek(file.fd, positions[file.number], os.SEEK_SET)

    def _end_deputy(self) -> None:
        assert self._exit_code is not None and self._tree is not None and self._start is not None
        self._journal.move(
            self._start.offer.transaction, Side.SOURCE, State.ENDED, after=State.RESUMED
        )
        if self._mute is not None:
            self._mute.finish(self._exit_code)
        elif self._deputy is not None:
            self._deputy.end(self._exit_code)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._tree.pid, signal.SIGCONT)  # a stopped deputy hears nothing
        if self._deputy_dead or process_state(self._tree.pid) is None:
            self._finished = True

    def _cut(self, reason: PeerError) -> None:
        if self._exit_code is not None:
            return
        log.warning("%s: lifeline: %s", self._guest, reason)
        self._say(NeedLifeline(self._where))

    # ------------------------------------------------------------------ migd

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock, _ = server.accept()
            link = Link(sock)
            self._links.append(link)
            self._reactor.register(link.fileno(), READ, lambda _: self._packet(link))
            if self._lifeline is not None and not self._lifeline.attached:
                link.send(NeedLifeline(self._where))

    def _packet(self, link: Link) -> None:
        received = link.receive()
        if received is None:
            self._reactor.unregister(link.fileno())
            self._links.remove(link)
            link.close()
            return
        packet, fds = received
        match packet:
            case Attach() if self._lifeline is not None and len(fds) >= 2:
                self._lifeline.attach(fds[0], fds[1])
            case Verdict(resumed):
                self._verdict = resumed
            case _:
                for fd in fds:
                    os.close(fd)

    def _say(self, packet: Progress | Departed | Failed | NeedLifeline | Ended) -> None:
        for link in self._links:
            link.send(packet)

    def _tell(self, step: str, sent_bytes: int) -> None:
        self._say(Progress(step, sent_bytes))

    def _give_back(self) -> None:
        for sink in self._sinks:
            sink.close()
        for source in self._sources:
            source.close()
        if self._view is not None:
            self._view.close()
        if self._lifeline is not None:
            self._lifeline.detach()
        self._drop_deputy()
        if self._listener is not None:
            self._reactor.unregister(self._listener.fileno())
            self._listener.close()
        if self._exit_code is not None:
            self._say(Ended(self._exit_code))
            dissolve("guard", self._guest)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._journal.close()


def pending_signals(pid: int) -> list[int]:
    """Signals pending for the process or its main thread: CRIU has put them into the images."""
    mask = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigPnd:", "ShdPnd:")):
            mask |= int(line.split()[1], 16)
    return [number for number in range(1, 65) if mask >> (number - 1) & 1]


def main() -> None:
    """Entry point of the guard process."""
    logging.basicConfig(level=logging.INFO, format="guard %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    Guard(sys.argv[1], Link(sock)).run()


if __name__ == "__main__":
    main()
