"""The root directory of a capsule away from home: this host's system, with what comes from home laid in.

A tmpfs holds the top: this host's directories are bound in one by one, home's directories and files over
them or beside them. So a path of home's may be missing here. Where one is missing below a directory of
this host's, that directory is replaced by a tmpfs with the same entries, each bound in, and room for
the new one. Nothing of it is seen outside the capsule's mount namespace.

Programs gain no rights in a capsule: all its mounts are nosuid. A setuid program of this host's would
trust files that home, another host, provides (libraries, configuration).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agent import syscalls
from agent.syscalls import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)
from criu_hooks import program
from criu_hooks.mounts import parse_mountinfo
from criu_hooks.statx import statx
from migrate import paths
from migrate.errors import HostError

MAX_ENTRIES = 2000
"""Of a directory that has to be rebuilt because an entry is missing in it."""
SHM_OPTIONS = "mode=1777"
_TMPFS = MS_NOSUID | MS_NODEV
MAX_LOOKS = 8
"""At home, at the same time."""


@dataclass(frozen=True)
class RootPlan:
    """What comes from home: absolute paths without links in them; none lies below another."""

    view: Path
    """where home's root directory is mounted"""
    directories: tuple[str, ...]
    files: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    """of these directories: they need not exist at home, or may be links or files there"""


def lay(plan: RootPlan, new: Path) -> None:
    """Build the root on the empty directory `new` and make it the caller's root directory.

    The caller is alone in its mount namespace, in which nothing is shared with the host's, and in the
    pid namespace that /proc is to show.

    :raises OSError: with the path that could not be laid.
    :raises HostError: something is missing at home, or no room can be made for it.
    """
    start = program.start_words()
    plugins = program.plugin_directory()
    syscalls.mount("capsule", new, "tmpfs", _TMPFS, "mode=0755")
    at_home = _look_at_home(plan)
    _lay_host(new, without=at_home.keys())
    _make_room(new, at_home)
    for path, entry in at_home.items():
        entry.lay(new / path[1:])
    _lay_run(new / "run")
    syscalls.mount("proc", new / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if (new / "dev/shm").is_dir():
        syscalls.mount("tmpfs", new / "dev/shm", "tmpfs", _TMPFS, SHM_OPTIONS)
    _keep_criu(new, start, plugins)
    syscalls.mount_setattr(new, syscalls.MOUNT_ATTR_NOSUID)
    os.chdir(new)
    syscalls.pivot_root(".", ".")
    syscalls.umount(Path(), MNT_DETACH)
    os.chdir("/")


@dataclass(frozen=True)
class _HomeEntry:
    """Something of home's, held by a path descriptor. Home may exchange it: nothing is looked up twice."""

    fd: int
    mode: int

    @classmethod
    def find(cls, view: Path, path: str) -> _HomeEntry:
        """No link is followed: it would lead to this host's files. Raises OSError."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(view, flags)
        for part in Path(path).parts[1:]:
            above = fd
            try:
                fd = os.open(part, flags, dir_fd=above)
            finally:
                os.close(above)
        # The kernel knows what it has just looked up: home need not be asked once more.
        return cls(fd, statx(f"/proc/self/fd/{fd}").mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def lay(self, target: Path) -> None:
        if self.is_link:
            target.symlink_to(os.readlink("", dir_fd=self.fd))
        else:
            syscalls.mount(f"/proc/self/fd/{self.fd}", target, flags=MS_BIND)
        os.close(self.fd)


def _look_at_home(plan: RootPlan) -> dict[str, _HomeEntry]:
    """Each path to lay, shallow ones first."""
    found = {}
    for path, look in _look_at_once(plan).items():
        try:
            entry = look.result()
        except (FileNotFoundError, NotADirectoryError):
            if path in plan.optional:
                continue
            raise HostError(path, "exists neither at home nor here") from None
        except OSError as error:
            raise HostError(path, f"cannot be had from home: {error.strerror}") from None
        if path not in plan.optional and not stat.S_ISDIR(entry.mode) and path in plan.directories:
            raise HostError(path, "is no directory at home")
        found[path] = entry
    return found


def _look_at_once(plan: RootPlan) -> dict[str, Future[_HomeEntry]]:
    """Each look is a question to home: they do not wait for each other's answers."""
    paths = sorted((*plan.directories, *plan.files), key=_depth)
    with ThreadPoolExecutor(MAX_LOOKS) as pool:
        return {path: pool.submit(_HomeEntry.find, plan.view, path) for path in paths}


def _depth(path: str) -> tuple[int, str]:
    return path.count("/"), path


def _lay_host(new: Path, without: Iterable[str]) -> None:
    """Every top directory of this host's that does not come from home."""
    skipped = {"/run", *without}
    with os.scandir("/") as entries:
        for entry in entries:
            if entry.path in skipped:
                continue
            if entry.path == "/proc":
                (new / "proc").mkdir()
            elif entry.is_symlink() or entry.is_dir():
                _copy_entry(entry, new / entry.name)


def _copy_entry(entry: os.DirEntry[str], target: Path) -> None:
    if entry.is_symlink():
        target.symlink_to(Path(entry.path).readlink())
    elif entry.is_dir():
        target.mkdir()
        syscalls.mount(entry.path, target, flags=MS_BIND | MS_REC)
    else:
        target.touch()
        syscalls.mount(entry.path, target, flags=MS_BIND)


def _make_room(new: Path, at_home: dict[str, _HomeEntry]) -> None:
    """Give every path that comes from home a mount point (or its place, if it is a link)."""
    missing: dict[str, set[str]] = {}
    for path, entry in at_home.items():
        base, child = _first_missing(path, entry.mode)
        if child:
            missing.setdefault(base, set()).add(child)
    for base in sorted(missing, key=_depth):
        if base != "/":
            _rebuild(new, base, missing[base])
    for path, entry in at_home.items():
        target = new / path[1:]
        if entry.is_link:
            target.parent.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISDIR(entry.mode):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch(exist_ok=True)


def _first_missing(path: str, mode: int) -> tuple[str, str]:
    """The deepest directory of this host's above `path`, and the entry to make in it; "" if none."""
    base = Path("/")
    parts = Path(path).parts[1:]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        wanted = stat.S_IFMT(mode) if last else stat.S_IFDIR
        try:
            found = stat.S_IFMT(os.lstat(base / part).st_mode)
        except FileNotFoundError:
            return str(base), part
        if found != wanted or found == stat.S_IFLNK:
            return str(base), part
        base /= part
    return str(base), ""


def _rebuild(new: Path, directory: str, without: set[str]) -> None:
    """Put a tmpfs in the place of a host's directory, with the same entries but some."""
    target = new / directory[1:]
    status = Path(directory).stat()
    with os.scandir(directory) as entries:
        listed = [entry for entry in entries if entry.name not in without]
    if len(listed) > MAX_ENTRIES:
        name = sorted(without)[0]
        raise HostError(
            directory,
            f"has no {name}, and too many entries to make room for it",
            f"create it there: mkdir {directory}/{name}",
        )
    mode = stat.S_IMODE(status.st_mode)
    options = f"mode={mode:o},uid={status.st_uid},gid={status.st_gid}"
    syscalls.mount("capsule", target, "tmpfs", _TMPFS, options)
    for entry in listed:
        _copy_entry(entry, target / entry.name)


def _lay_run(target: Path) -> None:
    """This host's /run, but of /run/migrate, where sockets and other guests' views are, nothing."""
    target.mkdir()
    syscalls.mount("/run", target, flags=MS_BIND)
    syscalls.mount("", target, flags=MS_PRIVATE)
    for mount in parse_mountinfo(Path("/proc/self/mountinfo").read_text()).mounts:
        path = Path(mount.path)
        if path.parent != path and path.is_relative_to("/run") and path != Path("/run"):
            if path.is_relative_to(paths.RUN_DIR):
                continue
            inside = target / path.relative_to("/run")
            if inside.exists():
                syscalls.mount(mount.path, inside, flags=MS_BIND)


def _keep_criu(new: Path, start: list[str], plugins: Path | None) -> None:
    """This host's own criu, in a place that only root can enter. See criu_hooks/program.py."""
    run = new / str(paths.RUN_DIR)[1:]
    syscalls.mount("capsule", run, "tmpfs", _TMPFS, "mode=0755")
    kept = new / str(program.KEPT_DIR)[1:]
    kept.mkdir(mode=0o700)
    for name in program.HOST_DIRECTORIES:
        source = Path("/") / name
        if source.is_dir() and not source.is_symlink():
            _bind_read_only(source, kept / name)
    empty_or_bound = new / str(program.PLUGINS)[1:]
    if plugins is None:
        empty_or_bound.mkdir()
    else:
        _bind_read_only(plugins, empty_or_bound)
    (new / str(program.START)[1:]).write_text("\n".join(start))


def _bind_read_only(source: Path, target: Path) -> None:
    target.mkdir()
    syscalls.mount(str(source), target, flags=MS_BIND)
    syscalls.mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
