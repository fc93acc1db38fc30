"""What a path in the images may be, and what its opening asks of the owner's rights.

CRIU opens, makes and removes files as root. It may do so only where the owner could: that is looked up
in the capsule (criu_hooks/owner_rights.py). Here is what the text of a path decides.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from criu_hooks.image_format import ImageError

_CREATING = os.O_CREAT | os.O_TRUNC
MAX_PATH = 4096

# A descriptor of /proc shows what its opener may see, and that is root. So only what all may see.
_PROC_OF_ALL = frozenset(
    f"/proc{name}"
    for name in (
        *("", "/cpuinfo", "/diskstats", "/filesystems", "/loadavg", "/meminfo"),
        *("/stat", "/uptime", "/version", "/vmstat"),
    )
)
_PROC_OF_TASK = re.compile(
    r"/proc/(\d+)(?:/task(?:/(\d+))?)?(?:/(?:stat|statm|status|maps|smaps|smaps_rollup|io|cmdline|comm"
    r"|fd|fdinfo|limits|cgroup|mountinfo|mounts|numa_maps|oom_score|sched|schedstat|wchan))?"
)
_DEVICES = re.compile(
    r"/dev(?:/(?:null|zero|full|random|urandom|tty|ptmx|pts(?:/ptmx)?|(?:shm|hugepages)(?:/.*)?))?"
)
_TERMINAL = re.compile(r"/dev/(?:pts/(?:\d+|ptmx)|ptmx|tty)")
_CAPSULES_TERMINAL = re.compile(r"/dev/pts/\d+")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What must be true in the capsule for the owner."""

    path: str
    access: int = os.F_OK
    """os.R_OK, os.W_OK, os.X_OK: what she may do with it"""
    makes: bool = False
    """instead: she may make and remove a file of this name"""
    mode: int | None = None
    """and it has this mode"""


def checked(path: str) -> str:
    """The path, which has one meaning only. Raises ImageError."""
    parts = path.split("/")
    if path != "/" and (parts[0] or len(parts) < 2 or not all(parts[1:]) or {".", ".."} & {*parts}):
        raise ImageError(f"{path!r} is no absolute path")
    if len(path) >= MAX_PATH:
        raise ImageError("a path is too long")
    return path


def wanted_access(flags: int) -> int:
    """What it takes to open a file with these flags of open(2). Raises ImageError."""
    if flags & _CREATING:
        raise ImageError("a file would be made or emptied")
    if flags & os.O_PATH:
        return os.F_OK
    match flags & os.O_ACCMODE:
        case os.O_RDONLY:
            return os.R_OK
        case os.O_WRONLY:
            return os.W_OK
        case os.O_RDWR:
            return os.R_OK | os.W_OK
    raise ImageError("a file would be opened in an unknown way")


def opening(path: str, access: int, pids: frozenset[int]) -> Wanted | None:
    """What opening a file asks for; None: nothing more.

    :param pids: of the tasks and threads in the images.
    :raises ImageError: nobody's images may name it.
    """
    checked(path)
    if path == "/proc" or path.startswith("/proc/"):
        of_task = _PROC_OF_TASK.fullmatch(path)
        mine = (
            of_task is not None and {int(number) for number in of_task.groups() if number} <= pids
        )
        if access & os.W_OK or not (mine or path in _PROC_OF_ALL):
            raise ImageError(f"{path} is not for a guest")
        return None
    if path == "/dev" or path.startswith("/dev/"):
        if _CAPSULES_TERMINAL.fullmatch(path):
            return None
        if not _DEVICES.fullmatch(path):
            raise ImageError(f"{path} is not for a guest")
    return Wanted(path, access)


def making(path: str) -> Wanted:
    """What it takes to make a file for a moment, and to remove it."""
    if checked(path).startswith(("/proc/", "/dev/")) and not path.startswith("/dev/shm/"):
        raise ImageError(f"{path} would be made")
    return Wanted(path, makes=True)


def terminal(path: str, mode: int) -> Wanted | None:
    """Of a terminal CRIU sets the mode: of one that is the host's to what it is already."""
    if not _TERMINAL.fullmatch(path):
        raise ImageError(f"{path} is no terminal")
    if path.startswith("/dev/pts/"):
        return None
    return Wanted(path, os.R_OK | os.W_OK, mode=mode)
