"""Image files: two u32 magics, then protobuf messages, each after its u32 length («Images» in CRIU's wiki).
The inventory has one magic only.

What the messages hold: criu_hooks/protobuf_wire.py.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

_U32 = struct.Struct("=I")
_COMMON_MAGIC = 0x54564319
"""The first magic. An inventory may ask CRIU to expect the second alone (img_version 1): with the
first in its place such an image is refused by CRIU instead of read four bytes earlier than here."""
_HEAD_BYTES = 2 * _U32.size
INVENTORY = "inventory.img"
_INVENTORY_MAGIC = 0x58313116
MAX_MESSAGE_BYTES = 1 << 24


class ImageError(Exception):
    """An image would give rights that its owner does not have, or cannot be read."""


@dataclass
class Image:
    """One file. `rest`: bytes after the messages, of the kinds that have such."""

    head: bytes
    messages: list[bytes]
    rest: bytes = b""

    @classmethod
    def read(cls, directory_fd: int, name: str, only_first: bool = False) -> Image:
        """:param only_first: after one message come other bytes.
        :raises ImageError: it is no image, or cut off.
        :raises OSError: it cannot be opened; a link is not followed.
        """
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
        with open(fd, "rb") as file:
            data = file.read()
        magic, head = _COMMON_MAGIC, _HEAD_BYTES
        if name == INVENTORY:
            magic, head = _INVENTORY_MAGIC, _U32.size
        if len(data) < head or _U32.unpack_from(data)[0] != magic:
            raise ImageError(f"{name} is no image of CRIU's")
        messages: list[bytes] = []
        at = head
        while at < len(data) and not (only_first and messages):
            message, at = take_message(data, at, name)
            messages.append(message)
        return cls(data[:head], messages, data[at:])

    def write(self, directory_fd: int, name: str) -> None:
        """Replace the contents of the file."""
        flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        words = [word for message in self.messages for word in (_U32.pack(len(message)), message)]
        with open(os.open(name, flags, dir_fd=directory_fd), "wb") as file:
            file.write(b"".join((self.head, *words, self.rest)))


def take_message(data: bytes, at: int, name: str) -> tuple[bytes, int]:
    """The message at an offset, and the offset after it. Raises ImageError."""
    if at + _U32.size > len(data):
        raise ImageError(f"{name} is cut off")
    size: int = _U32.unpack_from(data, at)[0]
    at += _U32.size
    if size > MAX_MESSAGE_BYTES:
        raise ImageError(f"{name} is too large")
    if at + size > len(data):
        raise ImageError(f"{name} is cut off")
    return data[at : at + size], at + size
