"""The namespaces that a process lives in."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from criu_hooks.proc import ProcDir


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Inode numbers of a process's namespaces; 0: not known, or the kernel has no such type."""

    cgroup: int = 0
    ipc: int = 0
    mnt: int = 0
    net: int = 0
    pid: int = 0
    pid_for_children: int = 0
    time: int = 0
    time_for_children: int = 0
    user: int = 0
    uts: int = 0

    @classmethod
    def of(cls, pid: int) -> Namespaces:
        """:raises OSError: the process is gone, or may not be looked at."""
        with ProcDir(pid) as proc:
            return read_namespaces(proc)

    def differing(self, other: Namespaces) -> tuple[str, ...]:
        """Names of the types that both know and in which they differ."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return tuple(name for name, mine, theirs in pairs if mine and theirs and mine != theirs)


_NAMESPACE = re.compile(r"^[a-z_]+:\[(\d+)\]$")


def read_namespaces(proc: ProcDir) -> Namespaces:
    """Namespaces of a process; those that can not be read are 0.

    :raises OSError: the process is gone, or may not be looked at.
    """
    inodes: list[int] = []
    for name in (f.name for f in fields(Namespaces)):
        try:
            found = _NAMESPACE.match(proc.link(f"ns/{name}"))
        except FileNotFoundError:  # a kernel without it, or a zombie
            found = None
        inodes.append(int(found.group(1)) if found else 0)
    return Namespaces(*inodes)
