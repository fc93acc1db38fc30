"""Open and mapped files that can not move, each looked at for itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from criu_hooks.fds import FileKind, FileLock, OpenFile
from criu_hooks.maps import MappedFile
from criu_hooks.obstacles import Note, Obstacle, file_subject, printable, process_subject
from criu_hooks.surroundings import Surroundings
from criu_hooks.tree import Process, ProcessTree

GHOST_LIMIT_BYTES = 1 << 20
"""CRIU's own default for --ghost-limit"""

_SYSTEM_DIRECTORIES = re.compile(
    r"^/(usr|lib|lib32|lib64|libx32|bin|sbin|etc|opt|var/lib|proc|sys|dev(?!/shm))(/|$)"
)
_MEMORY_DEVICES = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))
_PROC_OF = re.compile(r"^/proc/(\d+)(/|$)")
_HAVE_MOUNTS = frozenset(
    {FileKind.REGULAR, FileKind.DIRECTORY, FileKind.FIFO, FileKind.CHAR, FileKind.BLOCK}
)
_SHARED_MEMORY = "/dev/shm/"
_NAMED_MEMORY = (
    "is named shared memory, which lies in this host's /dev/shm",
    "unlink its name when all have opened it, or make the program use a file",
)
_MECHANISMS = {"FLOCK": "flock", "POSIX": "fcntl", "OFDLCK": "open file description"}
_REFUSED = {
    FileKind.NETLINK: (
        "is a netlink socket, whose state is in this host's kernel",
        "close it before the move",
    ),
    FileKind.FANOTIFY: ("watches this host's files (fanotify)", "close it before the move"),
    FileKind.IO_URING: (
        "is an io_uring, which CRIU can not dump",
        "make the program use another way of I/O (many have a setting)",
    ),
    FileKind.BLOCK: ("is a device of this host", "close it before the move"),
    FileKind.NAMESPACE: ("is a handle to a namespace of this host", "close it before the move"),
}


def default_view(path: str) -> bool:
    """Whether a path is of those that stay at home: all but the system's files."""
    return not _SYSTEM_DIRECTORIES.match(path)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the move that is planned can do for files."""

    in_view: Callable[[str], bool] = default_view
    """whether a path is served from home"""
    ghost_limit_bytes: int = GHOST_LIMIT_BYTES
    """the largest deleted file that CRIU may carry"""
    link_remap: bool = False
    """whether CRIU may make new names for files that have lost the one they were opened by"""


def file_obstacles(tree: ProcessTree, around: Surroundings, policy: Policy) -> Iterator[Obstacle]:
    """What is wrong with single files; one that several processes have inherited is named once."""
    said: set[tuple[str, str]] = set()
    for process, file in tree.files():
        for reason, remedy in _of_file(file, tree, around, policy):
            subject = file_subject(process, file)
            key = (subject if file.target.startswith("anon_inode:") else file.link, reason)
            if key not in said:
                said.add(key)
                yield Obstacle(subject, reason, remedy)
    for process in tree.members:
        for mapped in process.private.memory.files:
            for reason, remedy in _of_mapping(mapped, policy):
                if (mapped.path, reason) not in said:
                    said.add((mapped.path, reason))
                    yield Obstacle(_mapped_subject(process, mapped), reason, remedy)


def _of_file(
    file: OpenFile, tree: ProcessTree, around: Surroundings, policy: Policy
) -> Iterator[tuple[str, str]]:
    if file.kind in _REFUSED:
        yield _REFUSED[file.kind]
    if file.kind is FileKind.OTHER:
        yield (
            "is of a kind that CRIU can not dump",
            "close it before the move, or make the program do without",
        )
    if file.kind is FileKind.CHAR and file.special_device not in _MEMORY_DEVICES:
        yield "is a device of this host", "close it before the move"
    if file.kind is FileKind.SOCKET:
        yield f"is a socket of a kind that can not move ({file.protocol})", "close it"
    if file.kind is FileKind.EVENTFD and file.info.semaphore:
        yield (
            "is an eventfd used as a semaphore, which CRIU restores as a plain one",
            "make the program do without EFD_SEMAPHORE",
        )
    if file.kind is FileKind.PIPE and file.info.flags & os.O_DIRECT:
        yield "is a pipe in packet mode, which CRIU can not dump", "use one without O_DIRECT"
    if file.kind is FileKind.PIDFD:
        yield from _of_pidfd(file, tree)
    if file.info.descriptors_in_flight:
        yield "has descriptors on their way through it", "try again when they have arrived"
    if file.target.startswith(_SHARED_MEMORY) and not file.deleted:
        yield _NAMED_MEMORY
    yield from _of_path(file, tree, around)
    yield from _of_deleted(file, policy)
    yield from _of_locks(file, policy)


def _of_pidfd(file: OpenFile, tree: ProcessTree) -> Iterator[tuple[str, str]]:
    pid = file.info.pidfd_pid
    if pid is not None and pid >= 0 and pid not in tree.pids:
        who = f"pid {pid}" if pid else "a process of another pid namespace"
        yield f"is a pidfd of {who}, which stays here", "close it before the move"
    if file.info.flags & os.O_EXCL:
        yield "is a pidfd of a single thread, which CRIU can not dump", "close it"


def _of_path(file: OpenFile, tree: ProcessTree, around: Surroundings) -> Iterator[tuple[str, str]]:
    if file.kind not in _HAVE_MOUNTS:
        return
    if file.kind is FileKind.REGULAR and file.device in around.mounts.devices("mqueue"):
        yield "is a POSIX message queue", "close it before the move"
    elif file.info.mount_id not in around.mounts.ids:
        yield (
            "lies on a mount that the process can not see",
            "start it with files opened where it runs, or unmount nothing that it uses",
        )
    elif (found := _PROC_OF.match(file.target)) and int(found[1]) not in tree.pids:
        yield f"tells about pid {found[1]}, which stays here", "close it before the move"


def _of_deleted(file: OpenFile, policy: Policy) -> Iterator[tuple[str, str]]:
    if not file.deleted or file.kind is not FileKind.REGULAR:
        return
    if file.links and not policy.link_remap:
        yield (
            "was opened by a name that is deleted, while it has others",
            "open it by a name that still exists",
        )
    if not file.links and file.stored_bytes > policy.ghost_limit_bytes:
        yield _too_large(file.stored_bytes, policy)


def _too_large(stored_bytes: int, policy: Policy) -> tuple[str, str]:
    mib, limit = stored_bytes / (1 << 20), policy.ghost_limit_bytes / (1 << 20)
    return (
        f"is deleted and occupies {mib:.1f} MiB, more than the {limit:g} MiB that may travel along",
        "give it a name again or close it; after an upgrade, restart the program",
    )


def _of_locks(file: OpenFile, policy: Policy) -> Iterator[tuple[str, str]]:
    if not file.target.startswith("/") or not policy.in_view(file.target):
        return
    for lock in file.info.locks:
        if not lock.waiting:
            yield (
                f"holds {_lock_text(lock)}, and locks do not reach over to other hosts",
                "move it when the lock is released",
            )


def _lock_text(lock: FileLock) -> str:
    if lock.mechanism in _MECHANISMS:
        return f"a {lock.access.lower()} lock ({_MECHANISMS[lock.mechanism]})"
    return "a lease"


def _mapped_subject(process: Process, file: MappedFile) -> str:
    return f"{process_subject(process)}, mapped {printable(file.path)}"


def _of_mapping(file: MappedFile, policy: Policy) -> Iterator[tuple[str, str]]:
    if file.sysv:
        yield (
            "is System V shared memory, which belongs to this host",
            "use POSIX shared memory or mmap instead",
        )
    elif file.path.startswith(_SHARED_MEMORY) and not file.deleted:
        yield _NAMED_MEMORY
    elif file.path == "[uprobes]":
        yield "has probes set in its code (uprobes)", "end the tracing tool, restart the program"
    elif file.path.startswith(("anon_inode:", "socket:")) or _is_device(file):
        yield "is device memory or a ring of this host's kernel", "close it before the move"
    elif file.stored_bytes is not None and file.stored_bytes > policy.ghost_limit_bytes:
        yield _too_large(file.stored_bytes, policy)


def _is_device(file: MappedFile) -> bool:
    beyond = ("/dev/shm/", "/dev/hugepages/", "/dev/zero")
    return file.path.startswith("/dev/") and not file.path.startswith(beyond)


def file_notes(tree: ProcessTree) -> Iterator[Note]:
    """What works after a move, but not as before."""
    for process, file in tree.files():
        if file.kind is FileKind.INOTIFY:
            yield Note(
                file_subject(process, file),
                "queued events are lost, and changes that others make at home are not seen",
            )
        elif file.target.startswith(("/sys/", "/proc/")) and not _PROC_OF.match(file.target):
            yield Note(
                file_subject(process, file), "will tell about the host that the process runs on"
            )
