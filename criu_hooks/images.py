"""What images say about rights, checked before CRIU obeys them: they come from another host.

An image file is two u32 magics, then protobuf messages, each after its u32 length (see «Images» in
CRIU's wiki).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

from pycriu.images import core_pb2

_U32 = struct.Struct("=I")
_MAGICS = struct.pack("=II", 0x54564319, 0x55053847)
"""Common and core. An inventory may ask CRIU to expect the second alone (img_version 1): with the
first in its place such an image is refused by CRIU instead of read four bytes earlier than here."""
MAX_MESSAGE_BYTES = 1 << 24
TASK_DEAD = 2
"""A zombie (compel's task-state.h)."""


class ImageError(Exception):
    """An image would give rights that its owner does not have, or cannot be read."""


def check_rights(directory_fd: int, uid: int, gids: frozenset[int]) -> None:
    """Every thread in the images has this user's ids, only these groups, and no capabilities.

    :param directory_fd: of the directory with the images.
    :raises ImageError: with the first thread that has more.
    """
    seen = False
    for name in sorted(os.listdir(directory_fd)):
        if not name.startswith("core-") or not name.endswith(".img"):
            continue
        seen = True
        for message in _messages(directory_fd, name):
            try:
                core = core_pb2.core_entry.FromString(message)
            except Exception as error:
                raise ImageError(f"{name} cannot be read") from error
            _check(name, core, uid, gids)
    if not seen:
        raise ImageError("no process is in the images")


def _messages(directory_fd: int, name: str) -> Iterator[bytes]:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    with open(fd, "rb") as file:
        if file.read(len(_MAGICS)) != _MAGICS:
            raise ImageError(f"{name} is no image of a process")
        while head := file.read(_U32.size):
            if len(head) < _U32.size:
                raise ImageError(f"{name} is cut off")
            size: int = _U32.unpack(head)[0]
            if size > MAX_MESSAGE_BYTES:
                raise ImageError(f"{name} is too large")
            message = file.read(size)
            if len(message) < size:
                raise ImageError(f"{name} is cut off")
            yield message


def _check(name: str, core: core_pb2.core_entry, uid: int, gids: frozenset[int]) -> None:
    if core.tc.task_state == TASK_DEAD:
        return  # CRIU makes a process that only ends as this one did; it has no owner any more
    if not core.HasField("thread_core") or not core.thread_core.HasField("creds"):
        raise ImageError(f"{name} names no owner")
    creds = core.thread_core.creds
    if {creds.uid, creds.euid, creds.suid, creds.fsuid} != {uid}:
        raise ImageError(f"{name} belongs to another user than the offer said")
    if not {creds.gid, creds.egid, creds.sgid, creds.fsgid, *creds.groups} <= gids:
        raise ImageError(f"{name} is in a group that its user is not in")
    if any(
        word
        for words in (creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_amb)
        for word in words
    ):
        raise ImageError(f"{name} has capabilities")
    if creds.secbits:
        raise ImageError(f"{name} has securebits")
