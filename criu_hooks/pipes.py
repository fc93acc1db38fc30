"""Pipes that lead out of a process tree."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from criu_hooks.fds import FileKind, OpenFile, parse_fdinfo
from criu_hooks.outside import Holder, Holders
from criu_hooks.proc import ProcDir

Direction = Literal["in", "out", "both"]


@dataclass(frozen=True, slots=True)
class PipeEnd:
    """One descriptor of a pipe."""

    pid: int
    fd: int
    reads: bool
    writes: bool


@dataclass(frozen=True, slots=True)
class ExternalPipe:
    """A pipe that somebody outside the tree holds too.

    Outside may hold the other end, or the same end again: a sibling that writes to the same pipe.
    """

    inode: int
    direction: Direction
    """"in": the tree only reads from it; "out": it only writes; "both": nobody can serve that"""
    ends: tuple[PipeEnd, ...]
    """held by the tree"""
    outside: tuple[Holder, ...]
    """held by others; empty if they could not be looked at"""

    @property
    def key(self) -> str:
        """CRIU's name of it, for inherit-fd."""
        return f"pipe:[{self.inode}]"


def pipe_links(files: Iterable[OpenFile]) -> frozenset[str]:
    """What to ask `find_holders` for."""
    return frozenset(file.link for file in files if file.kind is FileKind.PIPE)


def external_pipes(
    files: Iterable[tuple[int, OpenFile]], holders: Holders
) -> tuple[ExternalPipe, ...]:
    """The pipes that are not the tree's alone, by inode.

    If not everybody could be looked at, a pipe of which the tree has one end counts as external.

    :param files: pid and open file, of the whole tree.
    """
    ends: dict[int, list[PipeEnd]] = {}
    for pid, file in files:
        if file.kind is FileKind.PIPE:
            end = PipeEnd(pid, file.fd, file.reads, file.writes)
            ends.setdefault(file.inode, []).append(end)
    pipes = []
    for inode, held in sorted(ends.items()):
        outside = holders.of(f"pipe:[{inode}]")
        direction = _direction(held)
        if outside or (not holders.complete and direction != "both"):
            pipes.append(ExternalPipe(inode, direction, tuple(held), outside))
    return tuple(pipes)


def _direction(ends: list[PipeEnd]) -> Direction:
    reads = any(end.reads for end in ends)
    writes = any(end.writes for end in ends)
    if reads and writes:
        return "both"
    return "out" if writes else "in"


def holder_end(holder: Holder) -> PipeEnd | None:
    """What a descriptor outside does with the pipe; None if it is gone."""
    try:
        with ProcDir(holder.pid) as proc:
            info = parse_fdinfo(proc.read(f"fdinfo/{holder.fd}"))
    except OSError:
        return None
    mode = info.flags & os.O_ACCMODE
    return PipeEnd(holder.pid, holder.fd, mode != os.O_WRONLY, mode != os.O_RDONLY)
