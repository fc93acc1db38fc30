"""The files that a process's memory is made of, from its mm image."""

from __future__ import annotations

from dataclasses import dataclass

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import Image, ImageError
from criu_hooks.image_names import wanted_access

# criu/include/image.h
_FILE_PRIVATE, _FILE_SHARED = 1 << 6, 1 << 7
_MEMFD = 1 << 14
_REFUSED = {
    1 << 10: "System V shared memory",
    1 << 11: "a mapped socket",
    1 << 17: "probes",
    1 << 27: "a plugin's memory",
}
_PROT_WRITE = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process maps."""

    program: int
    """id of the file that it was started from"""
    accesses: dict[int, int]
    """ids of files → what opening them for a mapping takes, as in access(2)"""


def read_memory(directory_fd: int, name: str) -> Memory:
    """:raises ImageError: it cannot be read, or maps what no guest may."""
    image = Image.read(directory_fd, name)
    if len(image.messages) != 1:
        raise ImageError(f"{name} is not one process's")
    mm = kinds.MM.read(image.messages[0])
    accesses: dict[int, int] = {}
    for message in mm.blob_lists.get("vmas", ()):
        vma = kinds.VMA.read(message)
        status = vma.number("status")
        for bit, what in _REFUSED.items():
            if status & bit:
                raise ImageError(f"{name} maps {what}")
        if status & (_FILE_PRIVATE | _FILE_SHARED) and not status & _MEMFD:
            flags = vma.numbers.get("fdflags")
            if flags is None:  # CRIU guesses so
                writing = status & _FILE_SHARED and vma.number("prot") & _PROT_WRITE
                flags = 2 if writing else 0
            number = vma.number("shmid")
            accesses[number] = accesses.get(number, 0) | wanted_access(flags)
    return Memory(mm.number("exe_file_id"), accesses)
