"""What a control connection's frames carry: a kind, the number of the request, and bytes."""

import enum
from dataclasses import dataclass

import msgspec

from agent.peer_errors import one_line
from migrate.errors import (
    ConfigError,
    CriuError,
    HostError,
    MigrateError,
    PeerError,
    UserError,
)
from migrate.framing import MALFORMED, MAX_FRAME_BYTES

HEADER_BYTES = 5
MAX_PAYLOAD_BYTES = MAX_FRAME_BYTES - HEADER_BYTES

_ERRORS: tuple[type[MigrateError], ...] = (
    UserError,
    ConfigError,
    HostError,
    PeerError,
    CriuError,
)


class Kind(enum.IntEnum):
    """What a frame is. ERROR is the answer to a REQUEST whose handler raised one."""

    REQUEST = 1
    ANSWER = 2
    ERROR = 3
    PING = 4
    PONG = 5


@dataclass(frozen=True)
class ControlFrame:
    """One frame; `number` ties an answer to its request."""

    kind: Kind
    number: int
    payload: bytes = b""


class _Failure(msgspec.Struct, frozen=True):
    blame: str
    what: str
    reason: str
    remedy: str


def encode_control(frame: ControlFrame) -> bytes:
    """The frame's payload on the wire."""
    return bytes([frame.kind]) + frame.number.to_bytes(4, "big") + frame.payload


def decode_control(data: bytes) -> ControlFrame:
    """:raises ValueError: it is none."""
    if len(data) < HEADER_BYTES:
        raise ValueError(f"a control frame of {len(data)} bytes")
    return ControlFrame(Kind(data[0]), int.from_bytes(data[1:HEADER_BYTES], "big"), data[5:])


def encode_error(error: MigrateError) -> bytes:
    """The payload of an ERROR frame: keeps who is to blame, and the three parts of the text."""
    blame = next((known.__name__ for known in _ERRORS if isinstance(error, known)), "")
    return msgspec.msgpack.encode(_Failure(blame, error.what, error.reason, error.remedy))


def decode_error(payload: bytes, peer: str) -> MigrateError:
    """The error that a peer reports, of its original class."""
    try:
        failure = msgspec.msgpack.decode(payload, type=_Failure)
    except MALFORMED:
        return PeerError(f"host {peer}", "it reports a failure that makes no sense")
    blamed = next((known for known in _ERRORS if known.__name__ == failure.blame), PeerError)
    return blamed(one_line(failure.what), one_line(failure.reason), one_line(failure.remedy))
