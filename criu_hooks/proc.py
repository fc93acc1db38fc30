"""What /proc says of one process, read and typed. Text formats: proc(5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

PF_KTHREAD = 0x00200000
"""flag of a kernel thread in /proc/PID/stat (kernel: include/linux/sched.h)"""


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat, as far as somebody here needs it."""

    pid: int
    comm: str
    state: str
    """R, S, D, Z, T, t, X, I"""
    ppid: int
    pgid: int
    sid: int
    tty_nr: int
    """device number of the controlling terminal; 0: none"""
    foreground: int
    """process group that has that terminal; -1: none"""
    flags: int
    starttime_ticks: int
    """clock ticks since boot; with the pid it names one process for good"""


@dataclass(frozen=True, slots=True)
class Ids:
    """User or group ids of a task."""

    real: int
    effective: int
    saved: int
    filesystem: int

    @property
    def same(self) -> bool:
        """Whether nothing was gained or put aside: all four are one id."""
        return self.real == self.effective == self.saved == self.filesystem


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Capability sets as bit masks."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who a task is and what it may do."""

    uids: Ids
    gids: Ids
    groups: tuple[int, ...]
    """supplementary groups"""
    capabilities: Capabilities
    no_new_privs: bool


@dataclass(frozen=True, slots=True)
class Status:
    """/proc/PID/status, as far as somebody here needs it."""

    state: str
    """as in Stat"""
    credentials: Credentials
    seccomp: int
    """0 none, 1 strict, 2 filter"""
    tracer_pid: int
    """0: nobody traces it"""
    umask: int
    threads: int
    core_dumping: bool
    resident_bytes: int
    dump_bytes: int
    """memory that a dump has to carry: anonymous, shared anonymous and swapped out"""


class ProcDir:
    """An open /proc/PID: all that is read through it belongs to one and the same process.

    When that process ends, reads raise OSError (ESRCH or ENOENT), also if its pid is used again.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.fd = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def read_bytes(self, name: str) -> bytes:
        """Whole content of one entry."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            chunks = []
            while chunk := os.read(fd, 1 << 16):
                chunks.append(chunk)
            return b"".join(chunks)
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """Whole content of one entry; what is no UTF-8 comes as surrogates, as os.fsdecode does."""
        return self.read_bytes(name).decode("utf-8", "surrogateescape")

    def link(self, name: str) -> str:
        """What a link of /proc points to, without following it."""
        return os.readlink(name, dir_fd=self.fd)

    def names(self, directory: str) -> list[str]:
        """Names of the entries of a subdirectory."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            return os.listdir(fd)  # noqa: PTH208
        finally:
            os.close(fd)

    def owner(self) -> int:
        """Uid that owns its private entries: the effective one; root if it is not dumpable."""
        return os.stat("stat", dir_fd=self.fd).st_uid


def parse_stat(text: str) -> Stat:
    """:raises ValueError: the text is no /proc/PID/stat."""
    head, _, tail = text.rpartition(")")
    pid, _, comm = head.partition(" (")
    values = tail.split()
    if len(values) < 20:
        raise ValueError(f"not a stat line: {text!r}")
    return Stat(
        pid=int(pid),
        comm=comm,
        state=values[0],
        ppid=int(values[1]),
        pgid=int(values[2]),
        sid=int(values[3]),
        tty_nr=int(values[4]),
        foreground=int(values[5]),
        flags=int(values[6]),
        starttime_ticks=int(values[19]),
    )


@dataclass(slots=True)
class _StatusLines:
    text: str
    values: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        pairs = (line.partition(":\t") for line in self.text.splitlines())
        self.values = {name: value for name, _, value in pairs}

    def number(self, name: str, base: int = 10) -> int:
        """0 if the line is missing: zombies have no memory, old kernels lack some lines."""
        value = self.values.get(name, "").split()
        return int(value[0], base) if value else 0

    def ids(self, name: str) -> Ids:
        real, effective, saved, filesystem = map(int, self.values[name].split())
        return Ids(real, effective, saved, filesystem)

    def kib(self, *names: str) -> int:
        return 1024 * sum(self.number(name) for name in names)


def parse_status(text: str) -> Status:
    """:raises KeyError, ValueError: the text is no /proc/PID/status."""
    lines = _StatusLines(text)
    return Status(
        state=lines.values["State"][:1],
        credentials=Credentials(
            uids=lines.ids("Uid"),
            gids=lines.ids("Gid"),
            groups=tuple(map(int, lines.values["Groups"].split())),
            capabilities=Capabilities(
                inheritable=lines.number("CapInh", 16),
                permitted=lines.number("CapPrm", 16),
                effective=lines.number("CapEff", 16),
                bounding=lines.number("CapBnd", 16),
                ambient=lines.number("CapAmb", 16),
            ),
            no_new_privs=lines.number("NoNewPrivs") == 1,
        ),
        seccomp=lines.number("Seccomp"),
        tracer_pid=lines.number("TracerPid"),
        umask=lines.number("Umask", 8),
        threads=lines.number("Threads"),
        core_dumping=lines.number("CoreDumping") == 1,
        resident_bytes=lines.kib("VmRSS"),
        dump_bytes=lines.kib("RssAnon", "RssShmem", "VmSwap"),
    )


def parse_cgroup(text: str) -> str:
    """Path of the cgroup (version 2) in /proc/PID/cgroup; "" if there is none."""
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    return ""


def pid_starttime(pid: int) -> int:
    """Start time of a process, in clock ticks since boot.

    :raises OSError: there is no such process.
    """
    with ProcDir(pid) as proc:
        return parse_stat(proc.read("stat")).starttime_ticks


def is_kernel_thread(pid: int) -> bool:
    """:raises OSError: there is no such process."""
    with ProcDir(pid) as proc:
        return bool(parse_stat(proc.read("stat")).flags & PF_KTHREAD)


def boot_id() -> str:
    """Identity of this boot of this host, a UUID."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def command_of(pid: int) -> str:
    """Name of a process, for messages; "?" if it is gone."""
    try:
        with ProcDir(pid) as proc:
            return parse_stat(proc.read("stat")).comm
    except OSError:
        return "?"


def all_pids() -> list[int]:
    """Pids of all processes that this /proc shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def ancestors(pid: int) -> Iterator[int]:
    """Parents of a process, the nearest first, up to pid 1; stops early where one is gone."""
    try:
        while pid > 1:
            with ProcDir(pid) as proc:
                pid = parse_stat(proc.read("stat")).ppid
            if pid:
                yield pid
    except OSError:
        return
