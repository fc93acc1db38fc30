"""The bulk connection of one transaction: images and pages one way, the commit protocol both ways.

Frames: kind (u8), length (u32, big endian), payload. Kinds: a message (msgpack), a piece of the
page stream, a small image file (u8 length of the name, name, contents).
"""

from __future__ import annotations

import os
import re
import struct
import time

import msgspec

from agent.link import TransactionMessage
from agent.reactor import READ, WRITE, Reactor
from agent.waiting import wait_for
from migrate.errors import PeerError
from migrate.framing import MALFORMED

MESSAGE = 1
PAGES = 2
IMAGE = 3
_HEADER = struct.Struct("!BI")
MAX_FRAME = 1 << 26
IMAGE_NAME = re.compile(r"[a-z0-9][A-Za-z0-9._-]{0,100}\.img", re.ASCII)
READ_BYTES = 1 << 20

_encode = msgspec.msgpack.Encoder().encode
_decode: msgspec.msgpack.Decoder[TransactionMessage] = msgspec.msgpack.Decoder(TransactionMessage)


class Bulk:
    """One end. Its descriptors are ours and non-blocking; while it waits, the reactor goes on.

    :param patience_seconds: longest time without any progress before PeerError is raised.
    :param extra_fd: kept open as long as the connection (the bridge's hold).
    """

    def __init__(
        self,
        reactor: Reactor,
        peer: str,
        fd_in: int,
        fd_out: int,
        patience_seconds: float,
        extra_fd: int = -1,
    ) -> None:
        self._reactor = reactor
        self.peer = peer
        self._in = fd_in
        self._out = fd_out
        self._extra = extra_fd
        self._patience = patience_seconds
        self._buffer = bytearray()
        self._closed = False
        for fd in (fd_in, fd_out):
            os.set_blocking(fd, False)
        self.sent_bytes = 0

    def close(self) -> None:
        """Close the descriptors."""
        if not self._closed:
            self._closed = True
            for fd in {self._in, self._out, self._extra} - {-1}:
                os.close(fd)

    def send_message(self, message: TransactionMessage) -> None:
        """Raises PeerError when the peer is cut off."""
        payload = _encode(message)
        self._write(_HEADER.pack(MESSAGE, len(payload)) + payload)

    def send_pages(self, view: memoryview) -> None:
        """A piece of the page stream."""
        self._write(_HEADER.pack(PAGES, len(view)))
        self._write(view)

    def send_image(self, name: str, contents: bytes) -> None:
        """A small image file."""
        head = bytes([len(name)]) + name.encode()
        self._write(_HEADER.pack(IMAGE, len(head) + len(contents)) + head + contents)

    def await_frame(self, patience_seconds: float) -> None:
        """Return when something has come, or the connection's end. Raises PeerError: nothing has."""
        if not self._buffer and not wait_for(self._reactor, self._in, READ, patience_seconds):
            raise PeerError(f"host {self.peer}", f"no answer within {patience_seconds:g} seconds")

    def receive(self, patience_seconds: float | None = None) -> tuple[int, bytearray]:
        """The next frame. Raises PeerError: the peer is silent, gone, or breaks the protocol."""
        head = self._take(_HEADER.size, patience_seconds)
        kind, length = _HEADER.unpack(head)
        if length > MAX_FRAME or kind not in (MESSAGE, PAGES, IMAGE):
            raise PeerError(f"host {self.peer}", "it breaks the protocol of migrations")
        return kind, self._take(length, patience_seconds)

    def receive_message(self, patience_seconds: float | None = None) -> TransactionMessage:
        """The next frame, which must be a message."""
        kind, payload = self.receive(patience_seconds)
        if kind != MESSAGE:
            raise PeerError(f"host {self.peer}", "it breaks the protocol of migrations")
        return self.decode(payload)

    def decode(self, payload: bytearray) -> TransactionMessage:
        """What a MESSAGE frame says. Raises PeerError."""
        try:
            return _decode.decode(payload)
        except MALFORMED as error:
            raise PeerError(f"host {self.peer}", f"its message makes no sense ({error})") from None

    def _take(self, size: int, patience: float | None) -> bytearray:
        limit = self._patience if patience is None else patience
        deadline = time.monotonic() + limit
        while len(self._buffer) < size:
            try:
                data = os.read(self._in, max(READ_BYTES, size - len(self._buffer)))
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not wait_for(self._reactor, self._in, READ, left):
                    raise PeerError(
                        f"host {self.peer}", f"no answer within {limit:g} seconds"
                    ) from None
                continue
            except OSError as error:
                raise PeerError(f"host {self.peer}", f"connection lost: {error.strerror}") from None
            if not data:
                raise PeerError(f"host {self.peer}", "it closed the connection")
            self._buffer += data
            deadline = time.monotonic() + limit
        taken = self._buffer[:size]
        del self._buffer[:size]
        return taken

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._out, view)
            except BlockingIOError:
                if not wait_for(self._reactor, self._out, WRITE, self._patience):
                    raise PeerError(
                        f"host {self.peer}", f"takes nothing for {self._patience:g} seconds"
                    ) from None
                continue
            except OSError as error:
                raise PeerError(f"host {self.peer}", f"connection lost: {error.strerror}") from None
            self.sent_bytes += count
            view = view[count:]


def parse_image(frame: bytearray) -> tuple[str, memoryview]:
    """Name and contents of an IMAGE frame. Raises PeerError for a name that is none of CRIU's."""
    length = frame[0] if frame else 0
    name = bytes(frame[1 : 1 + length]).decode("ascii", "replace")
    if not IMAGE_NAME.fullmatch(name):
        raise PeerError("image", f"{name!r} is no name of an image")
    return name, memoryview(frame)[1 + length :]
