"""What of a guest's files comes from its home: as the source knows it, for the offer.

Three kinds of paths:
- where users keep their own: every top directory that is not the system's, /var/tmp, and below the
  system's directories what the tree's owner may write to and works in or has open. Always from home.
- the system's programs: from home unless both hosts have the same (agent/programs.py).
- single files of the system that the tree maps or has open: named with size and time, so that the
  destination takes those from home that it lacks or has otherwise.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.link import Owner, SystemFile
from criu_hooks.fds import FileKind
from criu_hooks.tree import ProcessTree

SYSTEM_TOP = frozenset(
    (
        *("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "lost+found", "opt"),
        *("proc", "root", "run", "sbin", "sys", "usr", "var"),
    )
)
"""Top directories that a capsule has from the host it is on."""
SYSTEM_DIRECTORIES = (
    *("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/etc", "/opt"),
    *("/var/lib", "/var/log", "/proc", "/sys", "/dev", "/run", "/boot"),
)
KERNEL_DIRECTORIES = ("/proc", "/sys", "/dev")
MAX_FILES = 800
"""So many are named; CRIU itself checks the size of the others."""


def below(path: str, tops: Iterable[str]) -> bool:
    """Whether a path is one of these directories, or in one."""
    return any(path == top or path.startswith(top.rstrip("/") + "/") for top in tops)


def outermost(directories: Iterable[str]) -> tuple[str, ...]:
    """Without those that lie in another."""
    found: list[str] = []
    for path in sorted(set(directories), key=lambda path: (path.count("/"), path)):
        if not below(path, found):
            found.append(path)
    return tuple(found)


def in_view(path: str, shared_paths: tuple[str, ...], uid: int) -> bool:
    """Whether a path of this host comes from home for guests of a user's, as far as it alone tells."""
    if below(path, (*KERNEL_DIRECTORIES, *shared_paths)):
        return False
    if not below(path, SYSTEM_DIRECTORIES):
        return True
    try:
        return Path(path).parent.stat().st_uid == uid
    except OSError:
        return False


@dataclass(frozen=True)
class Used:
    """A path that a tree works in, maps or has open."""

    path: str
    """absolute, as the tree sees it"""
    seen: Path
    """the same from here"""

    @classmethod
    def by_process(cls, pid: int, path: str) -> Used:
        return cls(path, Path(f"/proc/{pid}/root{path}"))


def view_directories(
    used: Iterable[Used], owner: Owner, shared_paths: tuple[str, ...], root: Path = Path("/")
) -> tuple[str, ...]:
    """The directories that come from home wherever the guest goes.

    :param shared_paths: those that all hosts share anyway.
    :param root: home's root directory.
    """
    found = ["/var/tmp"]
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name not in SYSTEM_TOP and entry.is_dir(follow_symlinks=False):
                found.append(f"/{entry.name}")
    for one in used:
        within = one.seen.is_dir()
        directory = one.path if within else str(Path(one.path).parent)
        if directory == "/" or below(directory, KERNEL_DIRECTORIES) or below(directory, found):
            continue
        seen = one.seen if within else one.seen.parent
        if not below(directory, SYSTEM_DIRECTORIES) or _may_write(seen, owner):
            found.append(directory)
    return tuple(path for path in outermost(found) if not below(path, shared_paths))


def system_files(used: Iterable[Used], view: tuple[str, ...]) -> tuple[SystemFile, ...]:
    """Of these, what is outside of the view."""
    found: dict[str, SystemFile] = {}
    for one in used:
        path = one.path
        if path in found or path == "/" or below(path, (*view, *KERNEL_DIRECTORIES)):
            continue
        try:
            status = one.seen.stat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode):
            found[path] = SystemFile(path, -1, 0)
        elif stat.S_ISREG(status.st_mode):
            found[path] = SystemFile(path, status.st_size, int(status.st_mtime))
    return tuple(found[path] for path in sorted(found)[:MAX_FILES])


def used_by(tree: ProcessTree) -> list[Used]:
    """What a tree works in, maps and has open, but not what is deleted."""
    return [Used.by_process(pid, path) for pid, path in _paths(tree)]


def _paths(tree: ProcessTree) -> Iterator[tuple[int, str]]:
    for process in tree.members:
        if process.private.cwd.startswith("/"):
            yield process.pid, process.private.cwd
        for mapped in process.private.memory.files:
            if mapped.path.startswith("/") and not mapped.deleted and not mapped.kernel_object:
                yield process.pid, mapped.path
        for file in process.files:
            known = file.kind in (FileKind.REGULAR, FileKind.DIRECTORY, FileKind.FIFO)
            if known and file.target.startswith("/") and not file.deleted:
                yield process.pid, file.target


def _may_write(directory: Path, owner: Owner) -> bool:
    try:
        status = directory.stat()
    except OSError:
        return False
    groups = (owner.gid, *owner.groups)
    return bool(
        (status.st_uid == owner.uid and status.st_mode & stat.S_IWUSR)
        or (status.st_gid in groups and status.st_mode & stat.S_IWGRP)
        or status.st_mode & stat.S_IWOTH
    )
