"""The files and shared objects that a process has in its memory, from /proc/PID/maps."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from criu_hooks.proc import ProcDir
from criu_hooks.statx import statx

DELETED = " (deleted)"
_FOUR_GIB = 1 << 32
# Objects of the kernel's own: no file of that name was ever deleted.
_KERNEL_NAMES = ("/memfd:", "/SYSV", "/dev/zero", "/[aio]", "/anon_hugepage")


@dataclass(frozen=True, slots=True)
class MappedFile:
    """One file or shared object, mapped once or several times in one process."""

    path: str
    """as the kernel shows it, without « (deleted)»"""
    device: int
    """as /proc/PID/maps has it: on btrfs and overlayfs it can differ from st_dev"""
    inode: int
    deleted: bool
    shared: bool
    """at least one mapping is MAP_SHARED"""
    shared_writable: bool
    """at least one mapping is MAP_SHARED and writable now"""
    executable: bool
    start: int
    """address of its first mapping"""
    end: int
    stored_bytes: int | None = None
    """what a deleted file occupies; None: not known, or not deleted"""

    @property
    def sysv(self) -> bool:
        """Whether it is a System V shared memory segment."""
        return self.deleted and self.path.startswith("/SYSV")

    @property
    def kernel_object(self) -> bool:
        """Whether it lies in no file system: anonymous shared memory, memfd, SysV, AIO ring."""
        return self.deleted and self.path.startswith(_KERNEL_NAMES)


@dataclass(frozen=True, slots=True)
class Memory:
    """What /proc/PID/maps tells of an address space."""

    files: tuple[MappedFile, ...] = ()
    thirty_two_bit: bool = False
    """nothing lies above 4 GiB: a 32-bit (or x32) program"""


def parse_maps(text: str) -> Memory:
    """The mapped files, one entry for each, in the order of their first mapping.

    :raises ValueError: the text is no /proc/PID/maps.
    """
    found: dict[tuple[str, str, str], MappedFile] = {}
    highest = 0
    for line in text.splitlines():
        parts = line.split(None, 5)
        span, permissions, _, device, inode = parts[:5]
        path = parts[5] if len(parts) == 6 else ""
        if path == "[vsyscall]":
            continue
        start, _, end = span.partition("-")
        highest = int(end, 16)
        # The first System V segment has inode 0, too.
        if inode == "0" and not path.startswith(("/", "[uprobes]")):
            continue
        shared = permissions[3] == "s"
        new = MappedFile(
            path=path.removesuffix(DELETED).replace("\\012", "\n"),
            device=_device(device),
            inode=int(inode),
            deleted=path.endswith(DELETED),
            shared=shared,
            shared_writable=shared and permissions[1] == "w",
            executable=permissions[2] == "x",
            start=int(start, 16),
            end=highest,
        )
        key = (device, inode, path)
        found[key] = _joined(found[key], new) if key in found else new
    return Memory(tuple(found.values()), thirty_two_bit=0 < highest <= _FOUR_GIB)


def _joined(old: MappedFile, new: MappedFile) -> MappedFile:
    return replace(
        old,
        shared=old.shared or new.shared,
        shared_writable=old.shared_writable or new.shared_writable,
        executable=old.executable or new.executable,
    )


def _device(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major, 16), int(minor, 16))


def read_memory(proc: ProcDir) -> Memory:
    """The mapped files of a process, deleted ones with their size.

    :raises OSError: the process is gone, or may not be looked at.
    """
    memory = parse_maps(proc.read("maps"))
    return replace(memory, files=tuple(_sized(proc, file) for file in memory.files))


def _sized(proc: ProcDir, file: MappedFile) -> MappedFile:
    if not file.deleted or file.kernel_object:
        return file
    try:
        status = statx(f"map_files/{file.start:x}-{file.end:x}", proc.fd)
    except OSError:  # unmapped meanwhile, or no right to look (it takes CAP_CHECKPOINT_RESTORE)
        return file
    return replace(file, stored_bytes=status.stored_bytes)
