"""The mounts that a process sees, from /proc/PID/mountinfo."""

from __future__ import annotations

import os
from dataclasses import dataclass

from criu_hooks.proc import ProcDir


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    mount_id: int
    device: int
    path: str
    """mount point, as the process sees it"""
    fstype: str


@dataclass(frozen=True, slots=True)
class MountTable:
    """All mounts of one mount namespace below one root."""

    mounts: tuple[Mount, ...] = ()

    @property
    def ids(self) -> frozenset[int]:
        """Mount ids, as fdinfo names them."""
        return frozenset(mount.mount_id for mount in self.mounts)

    def devices(self, fstype: str) -> frozenset[int]:
        """Devices of the mounts of one type."""
        return frozenset(mount.device for mount in self.mounts if mount.fstype == fstype)


def parse_mountinfo(text: str) -> MountTable:
    """:raises ValueError, IndexError: the text is no mountinfo."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        parts = left.split()
        major, _, minor = parts[2].partition(":")
        mounts.append(
            Mount(
                mount_id=int(parts[0]),
                device=os.makedev(int(major), int(minor)),
                path=_unescaped(parts[4]),
                fstype=right.split()[0],
            )
        )
    return MountTable(tuple(mounts))


def _unescaped(path: str) -> str:
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(escape, character)
    return path


def read_mounts(pid: int) -> MountTable:
    """:raises OSError: the process is gone, or may not be looked at."""
    with ProcDir(pid) as proc:
        return parse_mountinfo(proc.read("mountinfo"))
