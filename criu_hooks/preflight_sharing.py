"""What a tree shares with processes that would stay behind: pipes, sockets, terminals, memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from criu_hooks.fds import FileKind, OpenFile
from criu_hooks.obstacles import Obstacle, file_subject, printable, process_subject
from criu_hooks.outside import Holder, MemoryObject, same_open_file
from criu_hooks.pipes import external_pipes, holder_end
from criu_hooks.proc import command_of
from criu_hooks.sockets import UnixSocket
from criu_hooks.statx import statx
from criu_hooks.surroundings import SHARED_STATE, Surroundings, communicates, memory_object
from criu_hooks.tree import Process, ProcessTree

_PTS = re.compile(r"^/dev/pts/(\d+)$")
_MOVABLE_PROTOCOLS = ("TCP", "UDP", "PING")


def sharing_obstacles(tree: ProcessTree, around: Surroundings) -> Iterator[Obstacle]:
    """Objects of which the tree has only a part, each named once."""
    yield from _of_pipes(tree, around)
    yield from _of_terminals(tree, around)
    yield from _of_memory(tree, around)
    unix_inodes = frozenset(f.inode for _, f in tree.files() if f.kind is FileKind.UNIX)
    said: set[str] = set()
    for process, file in tree.files():
        key = file_subject(process, file) if file.target.startswith("anon_inode:") else file.link
        if key in said:
            continue
        said.add(key)
        if file.kind is FileKind.UNIX:
            parts = _of_unix(file, around, unix_inodes)
        elif file.kind is FileKind.INET:
            parts = _of_inet(file, around)
        elif file.kind is FileKind.FIFO:
            parts = _of_fifo(file, tree, around)
        elif file.kind in SHARED_STATE:
            parts = _of_shared_state(process, file, around)
        elif file.deleted and file.kind is FileKind.REGULAR:
            parts = _of_deleted(file, around)
        else:
            continue
        for reason, remedy in parts:
            yield Obstacle(file_subject(process, file), reason, remedy)


def _who(pid: int) -> str:
    return f"pid {pid} ({printable(command_of(pid))})"


def _others(holders: tuple[Holder, ...]) -> str:
    pids = sorted({holder.pid for holder in holders})
    more = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
    return _who(pids[0]) + more


def _of_pipes(tree: ProcessTree, around: Surroundings) -> Iterator[Obstacle]:
    subjects = {
        (process.pid, file.fd): file_subject(process, file) for process, file in tree.files()
    }
    files = ((process.pid, file) for process, file in tree.files())
    for pipe in external_pipes(files, around.holders):
        if pipe.direction == "both":
            yield Obstacle(
                subjects[pipe.ends[0].pid, pipe.ends[0].fd],
                f"both ends of this pipe are in the tree, and {_others(pipe.outside)} has it too",
                "move the whole tree that uses it",
            )


def _of_fifo(file: OpenFile, tree: ProcessTree, around: Surroundings) -> Iterator[tuple[str, str]]:
    remedy = "use a pipe, or move the processes at both ends together"
    if holders := around.holders.of(file.link):
        yield f"{_others(holders)} has this named pipe too, which can not reach over", remedy
        return
    ends = [end for _, end in tree.files() if end.link == file.link]
    if not (any(e.reads for e in ends) and any(e.writes for e in ends)):
        yield "the other end of this named pipe would be opened here, not where it runs", remedy


def _of_unix(
    file: OpenFile, around: Surroundings, inside: frozenset[int]
) -> Iterator[tuple[str, str]]:
    found = around.unix.get(file.inode)
    if found is None:
        yield "is a socket of another network namespace", "close it before the move"
        return
    if found.reachable:
        yield (
            f"is bound to {printable(found.name)}, where its clients find it only on this host",
            "stop the service, or move its clients and it together before they connect",
        )
    if found.peer and found.peer not in inside:
        yield _outside_peer(found, around)
    elif holders := around.holders.of(file.link):
        yield f"{_others(holders)} has this socket too", "move the whole tree that uses it"


def _outside_peer(found: UnixSocket, around: Surroundings) -> tuple[str, str]:
    holders = around.holders.of(f"socket:[{found.peer}]")
    peer = around.unix.get(found.peer)
    name = f" at {printable(peer.name)}" if peer and peer.name else ""
    who = _others(holders) if holders else "a process that can not be seen"
    return (
        f"is connected to {who}{name}, outside of the tree",
        "close the connection, or move both ends together",
    )


def _of_inet(file: OpenFile, around: Surroundings) -> Iterator[tuple[str, str]]:
    if not file.protocol.startswith(_MOVABLE_PROTOCOLS):
        remedy = (
            "for Go programs: GODEBUG=multipathtcp=0" if "MPTCP" in file.protocol else "close it"
        )
        yield f"is a socket of a kind that can not move ({file.protocol})", remedy
        return
    found = around.inet.get(file.inode)
    if found is None:  # neither bound nor connected
        return
    if found.listening:
        yield (
            f"listens on {found.local} ({found.protocol}), and the address stays here",
            "stop the service before the move",
        )
    elif found.connected:
        yield (
            f"is connected, {found.local} to {found.remote} ({found.protocol}), "
            "and the address stays here",
            "close the connection before the move",
        )
    else:
        yield (
            f"uses {found.local} ({found.protocol}), and the address stays here",
            "close it before the move",
        )


def _of_shared_state(
    process: Process, file: OpenFile, around: Surroundings
) -> Iterator[tuple[str, str]]:
    holders = around.holders.of(file.link)
    if file.kind is FileKind.MEMFD:
        shared = tuple(h for h in holders if _same_inode(file, h))
        mapper = around.mappers.of(MemoryObject(file.device, file.inode))
        who = _others(shared) if shared else _who(mapper) if mapper else ""
    else:
        shared = tuple(h for h in holders if same_open_file(process.pid, file.fd, h))
        who = _others(shared) if shared else ""
    if who:
        yield f"{who} has this {file.kind.value} too", "move the whole tree that uses it"


def _of_deleted(file: OpenFile, around: Surroundings) -> Iterator[tuple[str, str]]:
    for holder in around.holders.of(file.link):
        if not _same_inode(file, holder):
            continue
        end = holder_end(holder)
        if file.writes or (end and end.writes):
            yield (
                f"{_who(holder.pid)} has this deleted file too, and would not see the same one",
                "give it a name, or move the whole tree that uses it",
            )
            return


def _same_inode(file: OpenFile, holder: Holder) -> bool:
    try:
        status = statx(f"/proc/{holder.pid}/fd/{holder.fd}")
    except OSError:
        return False
    return (status.device, status.inode) == (file.device, file.inode)


def _of_terminals(tree: ProcessTree, around: Surroundings) -> Iterator[Obstacle]:
    """One terminal can be relayed, no more; and who serves a terminal must move with its users."""
    masters = {f.info.tty_index for _, f in tree.files() if f.info.tty_index is not None}
    relayed: int | None = tree.root.tty_nr or None
    said: set[str] = set()
    for process, file in tree.files():
        if file.kind is not FileKind.TTY or file.link in said:
            continue
        if (index := file.info.tty_index) is not None:
            slave = f"/dev/pts/{index}"
            holders = tuple(
                h for h in around.holders.of(slave) if _same_terminal(process, slave, h)
            )
            if holders and slave not in said:
                said.add(slave)
                yield Obstacle(
                    file_subject(process, file),
                    f"{_others(holders)} uses the terminal {slave} that it serves",
                    "move the whole tree that uses it",
                )
            continue
        said.add(file.link)
        if file.special_device == os.makedev(5, 0) or _index(file) in masters:
            continue
        if relayed is None:
            relayed = file.special_device
        elif file.special_device != relayed:
            yield Obstacle(
                file_subject(process, file),
                "is a second terminal, and only one can be relayed",
                "close it before the move",
            )


def _same_terminal(process: Process, slave: str, holder: Holder) -> bool:
    """Not if it has that name in another instance of devpts: a container's, or a guest's."""
    try:
        served = statx(f"/proc/{process.pid}/root{slave}")
        used = statx(f"/proc/{holder.pid}/fd/{holder.fd}")
    except OSError:
        return True
    return (served.device, served.inode) == (used.device, used.inode)


def _index(file: OpenFile) -> int | None:
    found = _PTS.match(file.target)
    return int(found[1]) if found else None


def _of_memory(tree: ProcessTree, around: Surroundings) -> Iterator[Obstacle]:
    said: set[MemoryObject] = set()
    for process in tree.members:
        for file in process.private.memory.files:
            key = memory_object(file)
            if not communicates(file) or file.sysv or key in said:
                continue
            said.add(key)
            if pid := around.mappers.of(key):
                yield Obstacle(
                    f"{process_subject(process)}, mapped {printable(file.path)}",
                    f"is memory shared with {_who(pid)}, outside of the tree",
                    "move the whole tree that shares it",
                )
