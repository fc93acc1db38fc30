"""The files `PID/miggroup`: a process of its own, ``python -m agent.group_files DIRECTORY``, that serves them
by FUSE and asks migd, whose socket is its stdin, for every number. It ends with migd.

The text of a file is a number in ASCII; every write is a whole value, whatever its offset, as in /proc.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent import group_words, syscalls
from agent.group_words import Get, Identity, Mounted, Put
from criu_hooks.proc import ProcDir, all_pids, parse_stat

NAME = "miggroup"
_NUMBER = re.compile(rb"0*([0-9]{1,10})\n?")
_LOOP_ENDED = 8
"""what fuse_main() returns after SIGTERM (libfuse, lib/helper.c)"""
_LOCK = struct.Struct("hhqqi")
"""struct flock on 64-bit machines (fcntl(2)): type, whence, start, length, pid"""
_PID = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)


def parse_group(data: bytes) -> int:
    """The number that somebody writes. Raises OSError (EINVAL)."""
    found = _NUMBER.fullmatch(data)
    if found is None or int(found[1]) > group_words.GROUP_MAX:
        raise _failure(errno.EINVAL)
    return int(found[1])


@dataclass(frozen=True)
class Process:
    """A process that there is."""

    identity: Identity
    uid: int
    """who owns it, as /proc says: root, if it is not dumpable"""
    gid: int

    @classmethod
    def look(cls, pid: int) -> Process:
        """Raises OSError: there is none, or it is a thread of another."""
        try:
            os.close(os.pidfd_open(pid))  # refuses threads
            with ProcDir(pid) as proc:
                ticks = parse_stat(proc.read("stat")).starttime_ticks
                owner = os.stat("stat", dir_fd=proc.fd)
        except OSError:
            raise _failure(errno.ENOENT) from None
        return cls(Identity(pid, ticks), owner.st_uid, owner.st_gid)

    def may_write(self, uid: int) -> bool:
        """Its owner and root may."""
        return uid in (0, self.uid)


def _failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class GroupFiles:
    """The file system's operations, by the names that mfusepy calls. They fail with OSError."""

    use_ns = True
    """times are in ns"""

    def __init__(
        self,
        ask: Callable[[Get | Put], int],
        caller_uid: Callable[[], int],
        mounted: Callable[[], None],
    ) -> None:
        """:param mounted: called when the files are there."""
        self._ask = ask
        self._caller_uid = caller_uid
        self._mounted = mounted
        self._open: dict[int, Identity] = {}
        self._next = 1

    def init(self, path: str) -> None:
        self._mounted()

    # ------------------------------------------------------------------ names

    def getattr(self, path: str, handle: int | None = None) -> dict[str, int]:
        process, is_file = _find(path)
        now = time.time_ns()
        return {
            "st_mode": stat.S_IFREG | 0o644 if is_file else stat.S_IFDIR | 0o555,
            "st_nlink": 1 if is_file else 2,
            "st_uid": process.uid if process else 0,
            "st_gid": process.gid if process else 0,
            "st_size": 0,  # as in /proc
            "st_atime": now,
            "st_mtime": now,
            "st_ctime": now,
        }

    def readdir(self, path: str, handle: int) -> Iterator[str]:
        process, is_file = _find(path)
        if is_file:
            raise _failure(errno.ENOTDIR)
        names = [NAME] if process else map(str, all_pids())
        return iter([".", "..", *names])

    def access(self, path: str, mode: int) -> None:
        process, is_file = _find(path)
        writable = is_file and process is not None and process.may_write(self._caller_uid())
        if (mode & os.W_OK and not writable) or (mode & os.X_OK and is_file):
            raise _failure(errno.EACCES)

    # ------------------------------------------------------------------ contents

    def open(self, path: str, flags: int) -> int:
        process = self._file(path, write=flags & os.O_ACCMODE != os.O_RDONLY)
        handle = self._next
        self._next += 1
        self._open[handle] = process.identity
        return handle

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        text = b"%d\n" % self._ask(Get(self._still(handle)))
        return text[offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
        group = parse_group(data)
        self._ask(Put(self._still(handle), group))
        return len(data)

    def truncate(self, path: str, length: int, handle: int | None = None) -> None:
        """What a shell does before it writes."""
        self._file(path, write=True)
        if length:
            raise _failure(errno.EINVAL)

    def release(self, path: str, handle: int) -> None:
        self._open.pop(handle, None)

    def _file(self, path: str, *, write: bool) -> Process:
        process, is_file = _find(path)
        if process is None or not is_file:
            raise _failure(errno.EISDIR)
        if write and not process.may_write(self._caller_uid()):
            raise _failure(errno.EPERM)
        return process

    def _still(self, handle: int) -> Identity:
        """The process of an open file. Raises OSError (ESRCH): it is gone."""
        identity = self._open[handle]
        with contextlib.suppress(OSError):
            if Process.look(identity.pid).identity == identity:
                return identity
        raise _failure(errno.ESRCH)

    # ------------------------------------------------------------------ all else

    def _refuse(self, *_: object) -> None:
        raise _failure(errno.EPERM)

    chmod = chown = create = link = mkdir = mknod = rename = rmdir = symlink = unlink = utimens = (
        _refuse
    )


def _find(path: str) -> tuple[Process | None, bool]:
    """What a path names: the process, unless it is the top directory, and whether it is the file."""
    if path == "/":
        return None, False
    pid, _, name = path[1:].partition("/")
    if _PID.fullmatch(pid) is None or name not in ("", NAME) or int(pid) >= 1 << 31:
        raise _failure(errno.ENOENT)
    return Process.look(int(pid)), name == NAME


def replace_others(lock: Path) -> int:
    """Be the only process that serves the files: one whose migd has ended may still be about to unmount them.

    :return: a descriptor that holds the lock.
    """
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        wanted = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, holder = _LOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, wanted))
        if kind == fcntl.F_UNLCK:
            continue
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(holder)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
            finally:
                os.close(pidfd)


def prepare(directory: Path) -> None:
    """An empty directory to mount on, where one that was killed may have left its mount."""
    with contextlib.suppress(OSError):
        while True:
            syscalls.umount(directory, syscalls.MNT_DETACH)
    directory.mkdir(mode=0o755, exist_ok=True)
    directory.chmod(0o755)


def main() -> None:
    """Entry point; argv is the directory and migd's pid. Ends when it is unmounted, or by SIGTERM."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[2]):
        return  # migd has ended before
    directory = Path(sys.argv[1])
    sock = socket.socket(fileno=os.dup(0))
    replace_others(directory.with_name(f"{directory.name}.lock"))
    prepare(directory)
    # It takes version 2 of the library if there are both.
    os.environ["FUSE_LIBRARY_NAME"] = "fuse3"
    try:
        import mfusepy
    except OSError as error:
        sys.exit(f"group files: {error}; libfuse3, which comes with sshfs, is missing")
    files = GroupFiles(
        lambda question: group_words.ask(sock, question),
        lambda: int(mfusepy.fuse_get_context()[0]),
        lambda: sock.sendall(group_words.encode(Mounted())),
    )
    try:
        mfusepy.FUSE(
            files,
            str(directory),
            foreground=True,
            nothreads=True,
            allow_other=True,
            nosuid=True,
            nodev=True,
            noexec=True,
            direct_io=True,
            entry_timeout=0,
            attr_timeout=0,
            negative_timeout=0,
            fsname="migrate",
            subtype=NAME,
        )
    except RuntimeError as error:
        if error.args != (_LOOP_ENDED,):
            sys.exit(f"group files: libfuse cannot serve them ({error})")


if __name__ == "__main__":
    main()
