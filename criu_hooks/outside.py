"""Who, outside a process tree, holds the same objects: one look through everybody's descriptors."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from criu_hooks.proc import ProcDir, all_pids

_KCMP_FILE = 0
_KCMP_NUMBER = {"x86_64": 312, "aarch64": 272}
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Holder:
    """One descriptor of a process outside the tree."""

    pid: int
    fd: int


@dataclass(frozen=True, slots=True)
class Holders:
    """Who else holds what was asked for."""

    complete: bool = True
    """every process could be looked at; else somebody unseen may hold more"""
    _by_link: Mapping[str, tuple[Holder, ...]] = field(default_factory=dict)

    def of(self, link: str) -> tuple[Holder, ...]:
        """Holders of what /proc shows with this text (OpenFile.link), by pid."""
        return self._by_link.get(link, ())


def find_holders(inside: frozenset[int], links: frozenset[str]) -> Holders:
    """Looks once through the descriptors of all processes but `inside`.

    :param inside: pids of the tree.
    :param links: texts as /proc/PID/fd shows them.
    """
    if not links:
        return Holders()
    found: dict[str, list[Holder]] = {}
    complete = True
    for pid in sorted(all_pids()):
        if pid in inside:
            continue
        try:
            for fd, link in _links(pid):
                if link in links:
                    found.setdefault(link, []).append(Holder(pid, fd))
        except PermissionError:
            complete = False
        except OSError:
            continue
    return Holders(complete, {link: tuple(holders) for link, holders in found.items()})


def _links(pid: int) -> Iterator[tuple[int, str]]:
    with ProcDir(pid) as proc:
        directory = os.open("fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc.fd)
        try:
            for name in os.listdir(directory):  # noqa: PTH208
                try:
                    yield int(name), os.readlink(name, dir_fd=directory)
                except FileNotFoundError:
                    continue
        finally:
            os.close(directory)


@dataclass(frozen=True, slots=True)
class MemoryObject:
    """A mapped object, as /proc/PID/maps names it."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Mappers:
    """Who else has what was asked for in its memory."""

    _by_object: Mapping[MemoryObject, int] = field(default_factory=dict)

    def of(self, wanted: MemoryObject) -> int | None:
        """The lowest pid that maps it; None: nobody outside does."""
        return self._by_object.get(wanted)


def find_mappers(inside: frozenset[int], objects: frozenset[MemoryObject]) -> Mappers:
    """Looks once through the memory maps of all processes but `inside`."""
    if not objects:
        return Mappers()
    keys = {
        o: b" %02x:%02x %d " % (os.major(o.device), os.minor(o.device), o.inode) for o in objects
    }
    found: dict[MemoryObject, int] = {}
    for pid in sorted(all_pids()):
        if pid in inside:
            continue
        try:
            with ProcDir(pid) as proc:
                text = proc.read_bytes("maps")
        except OSError:
            continue
        for wanted, key in keys.items():
            if wanted not in found and key in text:
                found[wanted] = pid
    return Mappers(found)


def same_open_file(pid: int, fd: int, holder: Holder) -> bool:
    """Whether two descriptors are one open file (kcmp(2)); False if the kernel does not tell."""
    number = _KCMP_NUMBER.get(platform.machine())
    if number is None:
        return False
    answer: int = _libc.syscall(number, pid, holder.pid, _KCMP_FILE, fd, holder.fd)
    return answer == 0
