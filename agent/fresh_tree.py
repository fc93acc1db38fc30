"""The tree that leaves home for the first time, as its guard sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import guestwords
from agent.cgroups import Cgroup, guest_path, of_process
from agent.home_terminal import process_stat, sharers
from agent.identity import take_identity
from agent.link import (
    Dumped,
    OfferedTerminal,
    Planned,
    StartDeparture,
    StreamPipe,
    TerminalState,
)
from agent.syscalls import pidfd_getfd
from agent.terminal import criu_keys
from criu_hooks.fds import FileKind
from criu_hooks.pipes import ExternalPipe
from criu_hooks.preflight import examine
from criu_hooks.proc import pid_starttime
from criu_hooks.tree import ProcessTree
from migrate.errors import UserError


@dataclass
class HomeFile:
    """A regular file on stdio: home shares the description, so the deputy's side keeps its offset."""

    number: int
    fd: int


class FreshTerminal:
    """Home's terminal of the tree."""

    def __init__(self, pid: int, index: int) -> None:
        """:raises UserError: it was closed meanwhile."""
        self._pid = pid
        self.in_front = False
        """its keys go to the guest from the start"""
        self._alone = False
        try:
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = os.open(f"/dev/pts/{index}", flags)
        except OSError as error:
            raise UserError(f"pid {pid}", f"its terminal: {error.strerror}") from None
        self.keys = criu_keys(self._fd)

    def gather(self, tree: ProcessTree) -> None:
        """Before the freeze: who shares the foreground with it."""
        self._alone = not sharers(self._pid, tree.pids)[1]

    def describe(self, tree: ProcessTree, offered: OfferedTerminal) -> TerminalState:
        """Of the frozen tree."""
        stat = process_stat(self._pid)
        foreground = stat.foreground if offered.controlling and stat is not None else 0
        if foreground not in {process.pgid for process in tree.members}:
            foreground = 0
        if not self._alone or tree.root.state == "T":
            foreground = 0
        self.in_front = foreground > 0
        return TerminalState(self.keys, foreground, reading=self.in_front)

    def release(self) -> int:
        """Its descriptor, the caller's from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self.release())


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
        self.proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if pid_starttime(self.pid) != start.starttime_ticks:
            raise UserError(f"pid {self.pid}", "is another process by now", "look it up with ps")
        self.tree: ProcessTree | None = None
        self.pipes: dict[int, int] = {}
        """stream → our copy of home's descriptor"""
        self.files: list[HomeFile] = []
        self.pipe_list: tuple[StreamPipe, ...] = ()
        self.stdio: dict[int, list[int]] = {}
        """stream → the root's descriptors, of those that the deputy keeps"""
        self.pending: list[int] = []
        self.terminal: FreshTerminal | None = None
        if start.offer.terminal is not None:
            self.terminal = FreshTerminal(self.pid, start.offer.terminal.index)

    @property
    def terminal_keys(self) -> tuple[str, ...]:
        return self.terminal.keys if self.terminal is not None else ()

    def plan(self) -> Planned:
        tree = ProcessTree.capture(self.pid)
        tids: set[int] = set()
        for pid in tree.pids:
            with contextlib.suppress(OSError):
                tids.update(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
        # Sizes are told when all is frozen; nothing is made after them.
        pipes = [
            StreamPipe(stream, pipe.key, pipe.direction == "out", 0)
            for stream, pipe in self._numbered(tree)
        ]
        return Planned(tuple(pipes), tuple(sorted(tids)))

    @staticmethod
    def _numbered(tree: ProcessTree) -> Iterator[tuple[int, ExternalPipe]]:
        return enumerate(tree.external_pipes(), guestwords.FIRST_PIPE_STREAM)

    def gather(self) -> None:
        self.cgroup.create()
        known: set[int] = set()
        while True:
            tree = ProcessTree.capture(self.pid)
            members = [process.pid for process in tree.members]
            if not set(members) - known:
                if self.terminal is not None:
                    self.terminal.gather(tree)
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
        terminal = None
        if self.terminal is not None and self._start.offer.terminal is not None:
            terminal = self.terminal.describe(tree, self._start.offer.terminal)
        files = tuple(file.number for file in self.files)
        return Dumped(pipes=self.pipe_list, files=files, terminal=terminal)

    def _copy_descriptors(self, tree: ProcessTree) -> None:
        listed: list[StreamPipe] = []
        for stream, pipe in self._numbered(tree):
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
                self.files.append(HomeFile(file.fd, pidfd_getfd(self.pidfd, file.fd)))

    def put_back(self) -> None:
        """Undo: everything runs in the cgroup it came from."""
        for fd in (*self.pipes.values(), *(file.fd for file in self.files)):
            os.close(fd)
        self.pipes.clear()
        self.files.clear()
        if self.terminal is not None:
            self.terminal.close()
        put_back(self.cgroup, self.origin)


def put_back(cgroup: Cgroup, origin: Path) -> None:
    """Move everything back to the cgroup it came from, and let it run. No error if that is gone."""
    cgroup.thaw()
    while not origin.is_dir():
        origin = origin.parent
    while pids := cgroup.pids():
        for pid in pids:
            try:
                Cgroup(origin).add(pid)
            except ProcessLookupError:
                continue
            except OSError:
                return  # the kernel does not allow it there; it may stay where it is
    with contextlib.suppress(OSError):
        cgroup.remove()
        cgroup.path.parent.rmdir()


def pending_signals(pid: int) -> list[int]:
    """Signals pending for the process or its main thread: CRIU has put them into the images."""
    mask = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("SigPnd:", "ShdPnd:")):
            mask |= int(line.split()[1], 16)
    return [number for number in range(1, 65) if mask >> (number - 1) & 1]
