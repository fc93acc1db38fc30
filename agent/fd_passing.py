"""Receiving descriptors: socket.recv_fds(), but with close-on-exec from the first moment (it ignores flags)."""

from __future__ import annotations

import array
import os
import socket

_MOST_FDS = (1 << 31) - 1


def receive_fds(sock: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int], bool]:
    """One packet, the descriptors that came with it, and whether it was cut short. Raises OSError."""
    room = socket.CMSG_SPACE(max_fds * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    return data, list(fds), bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def close_all(fds: list[int]) -> None:
    """Give received descriptors back."""
    for fd in fds:
        os.close(fd)


def close_all_but(kept: int) -> None:
    """Close every descriptor but stdio and this one."""
    os.closerange(3, kept)
    os.closerange(kept + 1, _MOST_FDS)
