"""The open files of a process, from /proc/PID/fd and fdinfo."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from enum import Enum

from criu_hooks.maps import DELETED
from criu_hooks.proc import ProcDir
from criu_hooks.statx import statx


class FileKind(Enum):
    """What an open descriptor is; the value is its name in messages."""

    REGULAR = "file"
    DIRECTORY = "directory"
    PIPE = "pipe"
    FIFO = "named pipe"
    UNIX = "unix socket"
    INET = "internet socket"
    NETLINK = "netlink socket"
    SOCKET = "socket"
    TTY = "terminal"
    CHAR = "device"
    BLOCK = "block device"
    EVENTFD = "eventfd"
    EPOLL = "epoll"
    SIGNALFD = "signalfd"
    TIMERFD = "timerfd"
    INOTIFY = "inotify"
    FANOTIFY = "fanotify"
    IO_URING = "io_uring"
    MEMFD = "memfd"
    PIDFD = "pidfd"
    NAMESPACE = "namespace handle"
    OTHER = "special file"


@dataclass(frozen=True, slots=True)
class FileLock:
    """One lock or lease, as a line of /proc/locks or of an fdinfo shows it."""

    mechanism: str
    """FLOCK, POSIX, OFDLCK, LEASE or DELEG"""
    access: str
    """READ, WRITE, RW, UNLCK or NONE"""
    pid: int
    """who took it; -1 for open file description locks, 0 if it lives in another pid namespace"""
    device: int
    inode: int
    start: int
    end: int | None
    """None: to the end of the file"""
    waiting: bool
    """not held: asked for, and waiting"""


@dataclass(frozen=True, slots=True)
class FdInfo:
    """/proc/PID/fdinfo/FD; fields that only some kinds have are None for the others."""

    position: int
    flags: int
    mount_id: int
    locks: tuple[FileLock, ...] = ()
    semaphore: bool = False
    """an eventfd that counts down by one a read"""
    pidfd_pid: int | None = None
    """-1: that process has ended; 0: it lives in a pid namespace not seen from here"""
    tty_index: int | None = None
    """of a pty master: N of its /dev/pts/N"""
    descriptors_in_flight: int = 0
    """files sent over this unix socket and not yet received"""


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One open descriptor of a process."""

    fd: int
    kind: FileKind
    target: str
    """where its link in /proc points, without « (deleted)»"""
    deleted: bool
    inode: int
    device: int
    """where it lies, as in st_dev"""
    special_device: int
    """which device it is, as in st_rdev; 0 for others"""
    links: int
    """names the file still has"""
    stored_bytes: int
    protocol: str
    """of a socket: TCP, UDPv6, UNIX-STREAM, NETLINK...; else "" """
    info: FdInfo

    @property
    def reads(self) -> bool:
        """Whether it is open for reading."""
        return not self.info.flags & os.O_PATH and self.info.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writes(self) -> bool:
        """Whether it is open for writing."""
        return not self.info.flags & os.O_PATH and self.info.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def link(self) -> str:
        """The link's full text, as other processes' descriptors of the same object show it too."""
        return self.target + DELETED if self.deleted else self.target


_LOCK = re.compile(
    r"^\d+:(?P<waiting> ->)? *(?P<mechanism>[A-Z]+) +\S+ +(?P<access>[A-Z]+) +(?P<pid>-?\d+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+):(?P<inode>\d+) (?P<start>\d+) (?P<end>\d+|EOF)"
)


def parse_lock(line: str) -> FileLock | None:
    """One line of /proc/locks, or of an fdinfo without its « lock:»; None if it locks no file."""
    found = _LOCK.match(line)
    if found is None:
        return None
    return FileLock(
        mechanism=found["mechanism"],
        access=found["access"],
        pid=int(found["pid"]),
        device=os.makedev(int(found["major"], 16), int(found["minor"], 16)),
        inode=int(found["inode"]),
        start=int(found["start"]),
        end=None if found["end"] == "EOF" else int(found["end"]),
        waiting=found["waiting"] is not None,
    )


def parse_locks(text: str) -> tuple[FileLock, ...]:
    """All of /proc/locks."""
    locks = (parse_lock(line) for line in text.splitlines())
    return tuple(lock for lock in locks if lock is not None)


def parse_fdinfo(text: str) -> FdInfo:
    """:raises ValueError: a number in it is none."""
    position = flags = in_flight = 0
    mount_id = -1
    locks: list[FileLock] = []
    semaphore = False
    pidfd_pid: int | None = None
    tty_index: int | None = None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        value = value.strip()
        match name:
            case "pos":
                position = int(value)
            case "flags":
                flags = int(value, 8)
            case "mnt_id":
                mount_id = int(value)
            case "lock":
                if (lock := parse_lock(value)) is not None:
                    locks.append(lock)
            case "eventfd-semaphore":
                semaphore = value == "1"
            case "Pid":
                pidfd_pid = int(value)
            case "tty-index":
                tty_index = int(value)
            case "scm_fds":
                in_flight = int(value)
    return FdInfo(
        position, flags, mount_id, tuple(locks), semaphore, pidfd_pid, tty_index, in_flight
    )


_ANONYMOUS = {
    "anon_inode:[eventfd]": FileKind.EVENTFD,
    "anon_inode:[eventpoll]": FileKind.EPOLL,
    "anon_inode:[signalfd]": FileKind.SIGNALFD,
    "anon_inode:[timerfd]": FileKind.TIMERFD,
    "anon_inode:inotify": FileKind.INOTIFY,
    "anon_inode:[fanotify]": FileKind.FANOTIFY,
    "anon_inode:[io_uring]": FileKind.IO_URING,
    "anon_inode:[pidfd]": FileKind.PIDFD,
}
_INTERNET = ("TCP", "UDP", "MPTCP", "RAW", "PING", "SCTP", "DCCP")
# linux/major.h: vt, tty/console/ptmx, pts, ttyUSB, ttyACM, low-density serial, hvc
_TTY_MAJORS = frozenset({4, 5, *range(128, 144), 166, 188, 204, 229})
_NAMESPACE = re.compile(r"^[a-z_]+:\[\d+\]$")


def classify(target: str, mode: int, special_device: int, protocol: str, links: int) -> FileKind:
    """What a descriptor is, from the text of its link, its status and its socket's protocol."""
    if target in _ANONYMOUS:
        return _ANONYMOUS[target]
    if target.startswith("pidfd:["):
        return FileKind.PIDFD
    if target.startswith("socket:["):
        return _socket_kind(protocol)
    if target.startswith("/memfd:") and links == 0:
        return FileKind.MEMFD
    if _NAMESPACE.match(target) and not stat.S_ISFIFO(mode):
        return FileKind.NAMESPACE
    if target.startswith("anon_inode:"):
        return FileKind.OTHER
    match stat.S_IFMT(mode):
        case stat.S_IFREG:
            return FileKind.REGULAR
        case stat.S_IFDIR:
            return FileKind.DIRECTORY
        case stat.S_IFIFO:
            return FileKind.PIPE if target.startswith("pipe:[") else FileKind.FIFO
        case stat.S_IFCHR:
            tty = os.major(special_device) in _TTY_MAJORS
            return FileKind.TTY if tty else FileKind.CHAR
        case stat.S_IFBLK:
            return FileKind.BLOCK
        case _:
            return FileKind.OTHER


def _socket_kind(protocol: str) -> FileKind:
    if protocol.startswith("UNIX"):
        return FileKind.UNIX
    if protocol.startswith("NETLINK"):
        return FileKind.NETLINK
    return FileKind.INET if protocol.startswith(_INTERNET) else FileKind.SOCKET


def read_open_file(proc: ProcDir, fd: int) -> OpenFile:
    """:raises OSError: it was closed, the process is gone, or may not be looked at."""
    text = proc.link(f"fd/{fd}")
    status = statx(f"fd/{fd}", proc.fd)
    # A file may have this text as its name, but then it has a name.
    target = text.removesuffix(DELETED)
    protocol = _protocol(proc, fd) if target.startswith("socket:[") else ""
    return OpenFile(
        fd=fd,
        kind=classify(target, status.mode, status.special_device, protocol, status.links),
        target=target,
        deleted=text.endswith(DELETED),
        inode=status.inode,
        device=status.device,
        special_device=status.special_device,
        links=status.links,
        stored_bytes=status.stored_bytes,
        protocol=protocol,
        info=parse_fdinfo(proc.read(f"fdinfo/{fd}")),
    )


def _protocol(proc: ProcDir, fd: int) -> str:
    try:
        name = os.getxattr(f"/proc/self/fd/{proc.fd}/fd/{fd}", "system.sockprotoname")
    except OSError:
        return ""
    return name.rstrip(b"\0").decode("ascii", "replace")


def read_open_files(proc: ProcDir) -> tuple[OpenFile, ...]:
    """All open files of a process, by number; those closed meanwhile are left out.

    :raises OSError: the process is gone, or may not be looked at.
    """
    files = []
    for fd in sorted(map(int, proc.names("fd"))):
        try:
            files.append(read_open_file(proc, fd))
        except FileNotFoundError:
            continue
    return tuple(files)
