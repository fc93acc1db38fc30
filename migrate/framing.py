"""Frames: a length of four bytes (big endian), then so many bytes. Used on every socket we own.

What comes in may be hostile: a length beyond the limit is refused before anything is kept.
"""

from typing import Protocol

import msgspec

from migrate.errors import MigrateError

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Everything that decoding a hostile msgpack message can raise."""

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 20
"""The limit where nothing else is said; both sides of a socket must use the same."""


class FrameError(MigrateError):
    """The other side of a socket does not speak in frames as we do."""


class FrameTooLarge(FrameError):
    """A frame is larger than its socket allows."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__("message", f"{size_bytes} bytes long, at most {limit_bytes} are allowed")


class FrameTruncated(FrameError):
    """The stream ended within a frame."""

    def __init__(self, got_bytes: int) -> None:
        super().__init__("message", f"the connection ended within it, after {got_bytes} bytes")


class BlockingSocket(Protocol):
    """What a blocking `socket.socket` offers and frames need."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...


class AsyncReader(Protocol):
    """What `asyncio.StreamReader` offers and frames need."""

    async def readexactly(self, n: int, /) -> bytes: ...


def encode_frame(payload: bytes, limit_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The frame around `payload`.

    :raises FrameTooLarge: it is longer than `limit_bytes`.
    """
    if len(payload) > limit_bytes:
        raise FrameTooLarge(len(payload), limit_bytes)
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def decode_length(header: bytes | bytearray, limit_bytes: int = MAX_FRAME_BYTES) -> int:
    """The length in bytes that a header of HEADER_BYTES announces.

    :raises FrameTooLarge: it is more than `limit_bytes`.
    """
    size = int.from_bytes(header, "big")
    if size > limit_bytes:
        raise FrameTooLarge(size, limit_bytes)
    return size


def send_frame(sock: BlockingSocket, payload: bytes, limit_bytes: int = MAX_FRAME_BYTES) -> None:
    """Send one frame over a blocking socket.

    :raises FrameTooLarge: nothing was sent.
    :raises OSError: as the socket's own.
    """
    sock.sendall(encode_frame(payload, limit_bytes))


def recv_frame(sock: BlockingSocket, limit_bytes: int = MAX_FRAME_BYTES) -> bytes | None:
    """Receive one frame over a blocking socket, and not a byte more.

    :returns: its payload, or None if the stream ended between two frames.
    :raises FrameError: too large, or the stream ended within it.
    :raises OSError: as the socket's own (TimeoutError if it has a time limit).
    """
    header = _recv_upto(sock, HEADER_BYTES)
    if not header:
        return None
    if len(header) < HEADER_BYTES:
        raise FrameTruncated(len(header))
    size = decode_length(header, limit_bytes)
    payload = _recv_upto(sock, size)
    if len(payload) < size:
        raise FrameTruncated(HEADER_BYTES + len(payload))
    return payload


async def read_frame(reader: AsyncReader, limit_bytes: int = MAX_FRAME_BYTES) -> bytes | None:
    """As `recv_frame`, from an `asyncio.StreamReader` or its like."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
    except EOFError as end:
        if partial := getattr(end, "partial", b""):
            raise FrameTruncated(len(partial)) from end
        return None
    size = decode_length(header, limit_bytes)
    try:
        return await reader.readexactly(size)
    except EOFError as end:
        raise FrameTruncated(HEADER_BYTES + len(getattr(end, "partial", b""))) from end


class FrameDecoder:
    """Cuts a stream of bytes into frames, as they arrive; does no I/O itself.

    After an error the stream has no frames left to find: every later call raises it again.
    """

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._error: FrameError | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are complete now that `data` has arrived, in order.

        :raises FrameTooLarge: frames complete before the bad one are dropped with it.
        """
        if self._error is not None:
            raise self._error
        self._buffer += data
        frames: list[bytes] = []
        start = 0
        try:
            while len(self._buffer) - start >= HEADER_BYTES:
                body = start + HEADER_BYTES
                size = decode_length(self._buffer[start:body], self._limit_bytes)
                if len(self._buffer) - body < size:
                    break
                frames.append(bytes(self._buffer[body : body + size]))
                start = body + size
        except FrameError as error:
            self._error = error
            self._buffer.clear()
            raise
        del self._buffer[:start]
        return frames

    def finish(self) -> None:
        """Say that the stream has ended.

        :raises FrameTruncated: it ended within a frame.
        """
        if self._error is not None:
            raise self._error
        if self._buffer:
            self._error = FrameTruncated(len(self._buffer))
            raise self._error


def _recv_upto(sock: BlockingSocket, size: int) -> bytes:
    """`size` bytes, or fewer if the stream ends before."""
    chunks: list[bytes] = []
    missing = size
    while missing:
        chunk = sock.recv(missing)
        if not chunk:
            break
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)
