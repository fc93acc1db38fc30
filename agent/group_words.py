"""What the process that serves the group files and migd say to each other: one packet each way a question."""

from __future__ import annotations

import errno
import socket
from typing import Annotated

import msgspec

MAX_PACKET = 256
GROUP_MAX = (1 << 31) - 1

Pid = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Group = Annotated[int, msgspec.Meta(ge=0, le=GROUP_MAX)]
"""The number of a group of processes; 0: of none."""


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """A process of this host; a pid that is used again is another one."""

    pid: Pid
    starttime_ticks: Annotated[int, msgspec.Meta(ge=0)]


class Mounted(msgspec.Struct, frozen=True, tag="mounted"):
    """The files are there. Has no answer."""


class Get(msgspec.Struct, frozen=True, tag="get"):
    """Which group is it in? The answer is the number."""

    process: Identity


class Put(msgspec.Struct, frozen=True, tag="put"):
    """It joins this group, as its owner or root wants. The answer is the number."""

    process: Identity
    group: Group


Packet = Mounted | Get | Put

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Packet).decode
encode_answer = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(Group).decode


def ask(sock: socket.socket, question: Get | Put) -> int:
    """The number that migd answers. Raises OSError (EIO): migd has gone."""
    try:
        sock.send(encode(question))
        data = sock.recv(MAX_PACKET)
    except OSError:
        data = b""
    if not data:
        raise OSError(errno.EIO, "migd has gone")
    return _decode_answer(data)
