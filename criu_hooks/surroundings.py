"""What preflight has to know besides the tree: gathered once, as far as the tree calls for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from criu_hooks.fds import FileKind, OpenFile
from criu_hooks.maps import MappedFile
from criu_hooks.mounts import MountTable, read_mounts
from criu_hooks.namespaces import Namespaces
from criu_hooks.outside import Holders, Mappers, MemoryObject, find_holders, find_mappers
from criu_hooks.proc import ancestors
from criu_hooks.sockets import InetSockets, UnixSockets, inet_sockets, unix_sockets
from criu_hooks.tree import ProcessTree

# Whose state would be doubled if somebody outside held the same one.
SHARED_STATE = frozenset(
    {FileKind.EVENTFD, FileKind.TIMERFD, FileKind.EPOLL, FileKind.INOTIFY, FileKind.MEMFD}
)
_HELD_BY_OTHERS = SHARED_STATE | {FileKind.PIPE, FileKind.FIFO, FileKind.UNIX}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The host around a tree."""

    namespaces: Namespaces = field(default_factory=Namespaces)
    """the namespaces that the tree has to be in"""
    mounts: MountTable = field(default_factory=MountTable)
    holders: Holders = field(default_factory=Holders)
    mappers: Mappers = field(default_factory=Mappers)
    unix: UnixSockets = field(default_factory=UnixSockets)
    inet: InetSockets = field(default_factory=InetSockets)
    callers: frozenset[int] = frozenset()
    """the client that asks for the move, and its ancestors"""

    @classmethod
    def gather(
        cls, tree: ProcessTree, *, namespaces: Namespaces | None, caller_pid: int | None
    ) -> Surroundings:
        """:raises OSError: the root of the tree is gone, or the kernel lacks sock_diag."""
        files = [file for _, file in tree.files()]
        kinds = {file.kind for file in files}
        unix = unix_sockets() if FileKind.UNIX in kinds else UnixSockets()
        inet = inet_sockets(tree.root.pid) if FileKind.INET in kinds else InetSockets()
        callers = frozenset((caller_pid, *ancestors(caller_pid))) if caller_pid else frozenset()
        return cls(
            namespaces=namespaces or host_namespaces(),
            mounts=read_mounts(tree.root.pid),
            holders=find_holders(tree.pids, _links(files, unix)),
            mappers=find_mappers(tree.pids, shared_objects(tree)),
            unix=unix,
            inet=inet,
            callers=callers,
        )


def host_namespaces() -> Namespaces:
    """Those of pid 1; our own where it may not be looked at."""
    try:
        return Namespaces.of(1)
    except PermissionError:
        return Namespaces.of(os.getpid())


def _links(files: list[OpenFile], unix: UnixSockets) -> frozenset[str]:
    """Texts of the descriptors that others could hold too."""
    links = set()
    for file in files:
        if file.kind in _HELD_BY_OTHERS or file.deleted:
            links.add(file.link)
        if file.info.tty_index is not None:
            links.add(f"/dev/pts/{file.info.tty_index}")
        if file.kind is FileKind.UNIX and (found := unix.get(file.inode)) and found.peer:
            links.add(f"socket:[{found.peer}]")
    return frozenset(links)


def memory_object(file: MappedFile) -> MemoryObject:
    """What identifies a mapped object among all processes."""
    return MemoryObject(file.device, file.inode)


def shared_objects(tree: ProcessTree) -> frozenset[MemoryObject]:
    """Mapped objects through which the tree could talk to others.

    Those that only a mapping keeps alive count also if they are read-only here: others may write.
    """
    mapped = (
        memory_object(file)
        for process in tree.members
        for file in process.private.memory.files
        if communicates(file)
    )
    memfds = (
        MemoryObject(file.device, file.inode)
        for _, file in tree.files()
        if file.kind is FileKind.MEMFD
    )
    return frozenset((*mapped, *memfds))


def communicates(file: MappedFile) -> bool:
    """Whether this process and somebody else who maps it could notice each other through it."""
    return file.shared and (file.deleted or file.shared_writable)
