"""What images say about open files, adapted to files that live on at home while nobody here runs.

CRIU refuses a file whose size is not what it was at the dump. That guards mapped files, whose contents
the process has in part in its memory. A file that is only open is another matter: at home, too, somebody
may append to a log while its reader is stopped. So the sizes of such files of the home view are taken out.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from pycriu.images import fdinfo_pb2, mm_pb2

from criu_hooks.images import MAX_MESSAGE_BYTES, ImageError

_U32 = struct.Struct("=I")
_COMMON_MAGIC = 0x54564319
_HEAD_BYTES = 2 * _U32.size
_FILES = "files.img"


@dataclass(frozen=True)
class _Image:
    """A file of images/: its two magics, then its messages, each after its length."""

    head: bytes
    messages: tuple[bytes, ...]

    @classmethod
    def read(cls, directory_fd: int, name: str) -> _Image:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
        with open(fd, "rb") as file:
            data = file.read()
        if len(data) < _HEAD_BYTES or _U32.unpack_from(data)[0] != _COMMON_MAGIC:
            raise ImageError(f"{name} is no image")
        messages = []
        at = _HEAD_BYTES
        while at < len(data):
            if at + _U32.size > len(data):
                raise ImageError(f"{name} is cut off")
            size = _U32.unpack_from(data, at)[0]
            at += _U32.size
            if size > MAX_MESSAGE_BYTES or at + size > len(data):
                raise ImageError(f"{name} is cut off")
            messages.append(data[at : at + size])
            at += size
        return cls(data[:_HEAD_BYTES], tuple(messages))

    def write(self, directory_fd: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=directory_fd), "wb") as file:
            file.write(self.head)
            for message in self.messages:
                file.write(_U32.pack(len(message)) + message)


def forget_sizes(directory_fd: int, view: tuple[str, ...]) -> None:
    """Take out the sizes of open files that are mapped nowhere.

    :param directory_fd: of the directory with the images.
    :param view: the directories that come from home.
    :raises ImageError: an image cannot be read.
    """
    try:
        files = _Image.read(directory_fd, _FILES)
    except FileNotFoundError:
        return
    mapped = _mapped_ids(directory_fd)
    changed = tuple(_without_size(message, mapped, view) for message in files.messages)
    if changed != files.messages:
        _Image(files.head, changed).write(directory_fd, _FILES)


def _mapped_ids(directory_fd: int) -> frozenset[int]:
    """Ids of files that a process maps or was started from; an id of shared memory does no harm."""
    found: set[int] = set()
    for name in os.listdir(directory_fd):
        if not name.startswith("mm-") or not name.endswith(".img"):
            continue
        for message in _Image.read(directory_fd, name).messages:
            try:
                entry = mm_pb2.mm_entry.FromString(message)
            except Exception as error:
                raise ImageError(f"{name} cannot be read") from error
            found.add(entry.exe_file_id)
            found.update(vma.shmid for vma in entry.vmas)
    return frozenset(found)


def _without_size(message: bytes, mapped: frozenset[int], view: tuple[str, ...]) -> bytes:
    try:
        entry = fdinfo_pb2.file_entry.FromString(message)
    except Exception as error:
        raise ImageError(f"{_FILES} cannot be read") from error
    if not entry.HasField("reg") or not entry.reg.HasField("size") or entry.reg.id in mapped:
        return message
    if not any(entry.reg.name.startswith(top + "/") for top in view):
        return message
    entry.reg.ClearField("size")
    return bytes(entry.SerializePartialToString())
