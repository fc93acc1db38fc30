"""A snapshot of a process tree: the root and all its descendants, as /proc shows them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, field

from criu_hooks import pipes
from criu_hooks.fds import FileKind, OpenFile, read_open_files
from criu_hooks.maps import Memory, read_memory
from criu_hooks.namespaces import Namespaces, read_namespaces
from criu_hooks.outside import find_holders
from criu_hooks.proc import (
    PF_KTHREAD,
    Credentials,
    ProcDir,
    Status,
    all_pids,
    parse_cgroup,
    parse_stat,
    parse_status,
)
from migrate.errors import UserError

_PTS_MAJOR = 136
_ENDING_MS = 1000


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread; credentials, seccomp and tracer are each thread's own."""

    tid: int
    state: str
    kernel_function: str
    """where it waits, if it waits uninterruptibly (state D); else "" """
    credentials: Credentials
    seccomp: int
    tracer_pid: int


@dataclass(frozen=True, slots=True)
class Private:
    """What only the owner and root may read; all empty for a zombie or a stranger's process."""

    cmdline: tuple[str, ...] = ()
    exe: str = ""
    """as the kernel shows it, so maybe with « (deleted)»"""
    cwd: str = ""
    root: str = ""
    """"/" unless it was chrooted"""
    namespaces: Namespaces = field(default_factory=Namespaces)
    cgroup: str = ""
    """version 2 path, from the cgroup root that this process sees"""
    security_label: str = ""
    """AppArmor profile or SELinux context; "" if there is neither"""
    memory: Memory = field(default_factory=Memory)
    files: tuple[OpenFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the tree."""

    pid: int
    starttime_ticks: int
    """clock ticks since boot"""
    ppid: int
    pgid: int
    sid: int
    tty_nr: int
    """device number of the controlling terminal; 0: none"""
    state: str
    comm: str
    kernel_thread: bool
    dumpable: bool
    """as far as it can be told: always true for root's processes"""
    opaque: bool
    """the reader had no right to its private entries, or it is a zombie that has none"""
    absent: bool
    """it has none, whoever reads them"""
    status: Status
    threads: tuple[Thread, ...]
    private: Private

    @property
    def credentials(self) -> Credentials:
        """Those of its main thread."""
        return self.status.credentials

    @property
    def tids(self) -> tuple[int, ...]:
        """Thread ids, the main thread first."""
        return tuple(thread.tid for thread in self.threads)

    @property
    def files(self) -> tuple[OpenFile, ...]:
        """Its open files, by number."""
        return self.private.files

    @property
    def zombie(self) -> bool:
        """It has ended and waits for its parent; also if only its main thread has ended."""
        return self.state in "ZX"

    @property
    def dying(self) -> bool:
        """It is just ending: it has no memory any more, and is no zombie yet."""
        return self.absent and not (self.zombie or self.kernel_thread)

    @classmethod
    def read(cls, pid: int) -> Process:
        """:raises OSError: there is no such process, or it ended meanwhile."""
        process = cls._read(pid)
        if process.dying and _ends(pid):
            return cls._read(pid)
        return process

    @classmethod
    def _read(cls, pid: int) -> Process:
        with ProcDir(pid) as proc:
            status = parse_status(proc.read("status"))
            opaque = absent = False
            try:
                private = _read_private(proc)
            except PermissionError:
                private, opaque = Private(), True
            except FileNotFoundError:  # a zombie or a kernel thread has nothing of the kind
                private, opaque, absent = Private(), True, True
            threads = _read_threads(proc, status)
            owner = proc.owner()
            stat = parse_stat(proc.read("stat"))  # last: it was alive all the time
        return cls(
            pid=pid,
            starttime_ticks=stat.starttime_ticks,
            ppid=stat.ppid,
            pgid=stat.pgid,
            sid=stat.sid,
            tty_nr=stat.tty_nr,
            state=stat.state,
            comm=stat.comm,
            kernel_thread=bool(stat.flags & PF_KTHREAD),
            dumpable=owner == status.credentials.uids.effective,
            opaque=opaque,
            absent=absent,
            status=status,
            threads=threads,
            private=private,
        )


def _ends(pid: int) -> bool:
    """Wait for the end of a process that is just ending; False if it does not come."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(_ENDING_MS))
    finally:
        os.close(pidfd)


def _read_private(proc: ProcDir) -> Private:
    exe = proc.link("exe")
    return Private(
        cmdline=tuple(proc.read("cmdline").removesuffix("\0").split("\0")),
        exe=exe,
        cwd=proc.link("cwd"),
        root=proc.link("root"),
        namespaces=read_namespaces(proc),
        cgroup=parse_cgroup(proc.read("cgroup")),
        security_label=_optional(proc, "attr/current").rstrip("\0\n"),
        memory=read_memory(proc),
        files=read_open_files(proc),
    )


def _optional(proc: ProcDir, name: str) -> str:
    try:
        return proc.read(name)
    except OSError:
        return ""


def _read_threads(proc: ProcDir, status: Status) -> tuple[Thread, ...]:
    main = _thread(proc, proc.pid, status)
    if status.threads <= 1:
        return (main,)
    threads = [main]
    for tid in sorted(map(int, proc.names("task"))):
        if tid == proc.pid:
            continue
        try:
            threads.append(_thread(proc, tid, parse_status(proc.read(f"task/{tid}/status"))))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return tuple(threads)


def _thread(proc: ProcDir, tid: int, status: Status) -> Thread:
    where = _optional(proc, f"task/{tid}/wchan") if status.state == "D" else ""
    return Thread(tid, status.state, where, status.credentials, status.seccomp, status.tracer_pid)


@dataclass(frozen=True, slots=True)
class ProcessTree:
    """The root first, then its descendants, parents before children."""

    members: tuple[Process, ...]

    @property
    def root(self) -> Process:
        """The process that leaves a deputy."""
        return self.members[0]

    @property
    def pids(self) -> frozenset[int]:
        """Pids of all members."""
        return frozenset(process.pid for process in self.members)

    def files(self) -> Iterator[tuple[Process, OpenFile]]:
        """All open files of all members."""
        for process in self.members:
            for file in process.files:
                yield process, file

    @property
    def terminal_index(self) -> int | None:
        """N of /dev/pts/N: the root's controlling terminal, else one that is open in the tree."""
        if self.root.tty_nr:
            return pts_index(self.root.tty_nr)
        masters = {f.info.tty_index for _, f in self.files() if f.info.tty_index is not None}
        indexes = (
            pts_index(file.special_device)
            for _, file in self.files()
            if file.kind is FileKind.TTY and file.info.tty_index is None
        )
        return next((n for n in indexes if n is not None and n not in masters), None)

    @classmethod
    def capture(cls, root_pid: int) -> ProcessTree:
        """Reads the tree as it is now; members that end meanwhile are left out.

        :raises UserError: there is no process `root_pid`, or it ended meanwhile.
        """
        try:
            members = [Process.read(root_pid)]
        except (FileNotFoundError, ProcessLookupError):
            raise gone(root_pid) from None
        todo = [root_pid]
        seen = {root_pid}
        while todo:
            for pid in children_of(todo.pop(0)):
                if pid in seen:
                    continue
                seen.add(pid)
                try:
                    members.append(Process.read(pid))
                except (FileNotFoundError, ProcessLookupError):
                    continue
                todo.append(pid)
        return cls(tuple(members))

    def external_pipes(self) -> tuple[pipes.ExternalPipe, ...]:
        """The pipes that are not the tree's alone; looks at all processes if it has any pipe."""
        wanted = pipes.pipe_links(file for _, file in self.files())
        holders = find_holders(self.pids, wanted)
        return pipes.external_pipes(((p.pid, file) for p, file in self.files()), holders)


def pts_index(device: int) -> int | None:
    """N of /dev/pts/N by its device number; None: it is another device."""
    return os.minor(device) if os.major(device) == _PTS_MAJOR else None


def gone(pid: int) -> UserError:
    """What to raise for a pid that names no process."""
    return UserError(f"pid {pid}", "no such process", "look it up with ps")


def children_of(pid: int) -> tuple[int, ...]:
    """Pids of a process's children; empty if it is gone.

    Kernels without CONFIG_PROC_CHILDREN are asked the slow way, over all processes.
    """
    try:
        with ProcDir(pid) as proc:
            texts = [_children(proc, tid) for tid in proc.names("task")]
    except (FileNotFoundError, ProcessLookupError):
        return ()
    known = [text for text in texts if text is not None]
    if known or not texts:
        return tuple(sorted(int(child) for text in known for child in text.split()))
    return _children_by_parent(pid)


def _children(proc: ProcDir, tid: str) -> str | None:
    try:
        return proc.read(f"task/{tid}/children")
    except (FileNotFoundError, ProcessLookupError):
        return None


def _children_by_parent(parent: int) -> tuple[int, ...]:
    children = []
    for pid in all_pids():
        try:
            with ProcDir(pid) as proc:
                if parse_stat(proc.read("stat")).ppid == parent:
                    children.append(pid)
        except OSError:
            continue
    return tuple(sorted(children))
