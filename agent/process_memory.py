"""The memory of a process that is held by ptrace: where things are in it, and what stands there."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import HostError

_SYSCALL_INSTRUCTION = b"\x0f\x05"


class NoRoomError(Exception):
    """The process has no memory that it could spare."""


class Memory:
    """The memory of a held process; of the program it runs now, not of one it execs later."""

    def __init__(self, pid: int) -> None:
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self._fd, size, address)

    def write(self, address: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, address)
            if not written:
                raise ProcessLookupError
            view = view[written:]
            address += written


@dataclass(frozen=True)
class Mapping:
    """One line of /proc/PID/maps."""

    start: int
    end: int
    rights: str
    inode: int
    name: str


def mappings(pid: int) -> Iterator[Mapping]:
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        start, end = (int(text, 16) for text in span.split("-"))
        yield Mapping(start, end, rights, int(inode), name[0] if name else "")


def syscall_address(pid: int) -> int:
    """Where a system call instruction stands in executable memory: in the vdso, else anywhere.

    :raises HostError: nowhere.
    """
    executable = [mapping for mapping in mappings(pid) if "x" in mapping.rights]
    executable.sort(key=lambda mapping: mapping.name != "[vdso]")
    with Memory(pid) as memory:
        for mapping in executable:
            with contextlib.suppress(OSError):  # [vsyscall] cannot be read
                data = memory.read(mapping.start, mapping.end - mapping.start)
                if (found := data.find(_SYSCALL_INSTRUCTION)) >= 0:
                    return mapping.start + found
    raise HostError(f"pid {pid}", "it has no system call instruction in its memory")


def scratch(pid: int, size: int) -> int:
    """The address of writable memory that the process does not need any more, as it ends.

    The far end of the stack: what is at the near end /proc shows as its arguments.

    :raises NoRoomError: there is none.
    """
    private = [
        mapping
        for mapping in mappings(pid)
        if mapping.rights.startswith("rw") and mapping.rights.endswith("p") and not mapping.inode
    ]
    private.sort(key=lambda mapping: (mapping.name != "[stack]", mapping.start - mapping.end))
    for mapping in private:
        if mapping.end - mapping.start >= size:
            return mapping.start
    raise NoRoomError("no room in its memory")
