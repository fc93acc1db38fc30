"""What crosses a lifeline: frames, and the two halves of a resumable stream.

Nothing here knows of descriptors. docs/protocol-lifeline.md is the description of the protocol.
"""

import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from migrate.errors import PeerError

MAGIC: Final = "migrate-lifeline-1"
WINDOW: Final = 1 << 20
"""Bytes of one direction that may lie unacknowledged, unless a stream says otherwise."""
MAX_PAYLOAD: Final = 1 << 20
MAX_HELLO: Final = 1 << 16
MAX_OFFSET: Final = 1 << 62
MAX_STREAMS: Final = 256
MERGE_BYTES: Final = 4096
"""Smaller writes are joined up to this size: a window of single bytes stays small in memory."""

HEADER: Final = struct.Struct(">BIQI")  # type, stream, offset, length of the payload
DATA: Final = 1
ACK: Final = 2
FIN: Final = 3
RESET: Final = 4
HELLO: Final = 5
PING: Final = 6
PONG: Final = 7

Offset = Annotated[int, Meta(ge=0, le=MAX_OFFSET)]
StreamId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Window = Annotated[int, Meta(gt=0, le=1 << 30)]


class ProtocolError(PeerError):
    """The other end broke the protocol of the lifeline: drop the transport, perhaps the peer."""

    def __init__(self, reason: str) -> None:
        super().__init__("lifeline", reason)


class Position(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a stream's incoming direction has been received; its FIN counts as one."""

    stream: StreamId
    received: Offset


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first frame on every transport, in both directions. `epoch` is the number of hops."""

    magic: Annotated[str, Meta(max_length=64)]
    guest: Annotated[str, Meta(min_length=1, max_length=64)]
    epoch: Annotated[int, Meta(ge=0, lt=1 << 32)]
    positions: Annotated[tuple[Position, ...], Meta(max_length=MAX_STREAMS)]


class StreamState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stream as it is handed to the next keeper. Offsets are data bytes since the guest's birth.

    `unacked` begins at offset `acked`. `refused`: the other end wants no more of it. What was
    received but not `consumed` is left out: the other end still has it and sends it again.
    """

    stream: StreamId
    window: Window
    acked: Offset
    unacked: bytes
    fin: bool
    fin_acked: bool
    refused: bool
    consumed: Offset
    finished: bool
    refusing: bool


class LifelineState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One end of a lifeline, to be continued elsewhere. `dropped` streams are never to return."""

    guest: Annotated[str, Meta(min_length=1, max_length=64)]
    epoch: Annotated[int, Meta(ge=0, lt=1 << 32)]
    streams: Annotated[tuple[StreamState, ...], Meta(max_length=MAX_STREAMS)]
    dropped: Annotated[tuple[StreamId, ...], Meta(max_length=1 << 16)]


def nothing() -> None:
    """The callback of nobody."""


class Sender:
    """The outgoing direction of a stream: keeps every byte until the other end has consumed it.

    On the wire FIN counts as one byte after the last, so `acked` and `sent` reach `end` + 1.
    `on_ack` is called when `acked` has grown (so there may be `room`), `on_reset` when the other
    end wants no more; `on_pending` belongs to the lifeline.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.acked = 0
        self.sent = 0
        self.end = 0
        self.fin = False
        self.reset = False
        self.on_ack: Callable[[], None] = nothing
        self.on_reset: Callable[[], None] = nothing
        self.on_pending: Callable[[], None] = nothing
        self._starts: list[int] = []
        self._chunks: list[bytes] = []

    @property
    def room(self) -> int:
        """Bytes that may be written now; 0 when the direction is at its end."""
        return 0 if self.fin or self.reset else max(0, self.window - (self.end - self.acked))

    @property
    def finished(self) -> bool:
        """The other end has consumed everything and the FIN."""
        return self.acked > self.end

    @property
    def pending(self) -> bool:
        """Something may be sent now: unsent bytes within the window, or a FIN."""
        if self.reset:
            return False
        if self.sent < self.end:
            return self.sent < self.acked + self.window
        return self.fin and self.sent == self.end

    def write(self, data: bytes) -> None:
        """Append; more than `room` is kept too, but stays unsent until the window opens."""
        if self.reset or not data:
            return
        if self.fin:
            raise ValueError("write after finish")
        if self._chunks and len(self._chunks[-1]) + len(data) <= MERGE_BYTES:
            self._chunks[-1] += data
        else:
            self._starts.append(self.end)
            self._chunks.append(data)
        self.end += len(data)
        self.on_pending()

    def finish(self) -> None:
        """No more will be written."""
        if not self.fin:
            self.fin = True
            self.on_pending()

    def next_data(self, limit: int) -> list[memoryview]:
        """The next unsent bytes, at most `limit`; they count as sent."""
        stop = min(self.end, self.acked + self.window, self.sent + limit)
        views: list[memoryview] = []
        index = bisect_right(self._starts, self.sent) - 1
        while self.sent < stop:
            start = self._starts[index]
            view = memoryview(self._chunks[index])[self.sent - start : stop - start]
            views.append(view)
            self.sent += len(view)
            index += 1
        return views

    def next_fin(self) -> bool:
        """Whether the FIN is to go out now; it counts as sent."""
        due = self.fin and not self.reset and self.sent == self.end
        self.sent += due
        return due

    def accept_ack(self, offset: int) -> None:
        if offset > self.sent:
            raise ProtocolError(f"acknowledges byte {offset} of {self.sent} sent")
        if offset <= self.acked:
            return
        self.acked = offset
        if offset >= self.end:
            self._starts.clear()
            self._chunks.clear()
        else:
            done = bisect_right(self._starts, offset) - 1
            del self._starts[:done], self._chunks[:done]
        if self.pending:
            self.on_pending()
        self.on_ack()

    def accept_reset(self, offset: int) -> None:
        """The other end consumed `offset` bytes and wants no more."""
        self.accept_ack(offset)
        if not self.reset and not self.finished:
            self.reset = True
            self._starts.clear()
            self._chunks.clear()
            self.on_reset()

    def rewind(self, received: int) -> None:
        """A new transport: go on after what the other end has received."""
        if self.reset:
            return
        if not self.acked <= received <= self.sent:
            raise ProtocolError(f"has {received} bytes, not {self.acked} to {self.sent}")
        self.sent = received

    def unacked(self) -> bytes:
        """The data from `acked` to `end`."""
        if not self._chunks:
            return b""
        return b"".join(self._chunks)[self.acked - self._starts[0] :]


class Receiver:
    """The incoming direction of a stream: what arrived waits here until its consumer takes it.

    `received` ≥ `taken` (given to the consumer) ≥ `consumed` (done with: this is acknowledged).
    `on_readable` is called when data or the end arrived; `on_due` belongs to the lifeline.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.received = 0
        self.taken = 0
        self.consumed = 0
        self.fin_at: int | None = None
        self.finished = False
        self.reset = False
        self.on_readable: Callable[[], None] = nothing
        self.on_due: Callable[[], None] = nothing
        self._chunks: deque[memoryview] = deque()

    @property
    def at_end(self) -> bool:
        """Everything has been taken, and no more will come."""
        return self.fin_at is not None and self.taken == self.fin_at

    @property
    def position(self) -> int:
        """What has been received; the FIN counts as one."""
        return self.received + (self.fin_at is not None)

    @property
    def acknowledged(self) -> int:
        """What has been consumed; the FIN counts as one."""
        return self.consumed + self.finished

    def peek(self) -> memoryview:
        """The next bytes to take, empty when there are none. Valid until the loop goes on."""
        return self._chunks[0] if self._chunks else memoryview(b"")

    def take(self, count: int) -> None:
        """Remove `count` bytes of what `peek` showed."""
        chunk = self._chunks.popleft()
        if count < len(chunk):
            self._chunks.appendleft(chunk[count:])
        self.taken += count

    def consume(self, offset: int) -> None:
        """Everything below `offset` is done with."""
        if not self.consumed <= offset <= self.taken:
            raise ValueError(f"consumed {offset}, not {self.consumed} to {self.taken}")
        if offset > self.consumed:
            self.consumed = offset
            self.on_due()

    def finish(self) -> None:
        """The end itself is done with (for instance: the final descriptor is closed)."""
        if not self.at_end:
            raise ValueError("finish before the end")
        self.consume(self.taken)
        if not self.finished:
            self.finished = True
            self.on_due()

    def refuse(self) -> None:
        """Nobody reads this any more: have the sender told, and discard what still comes."""
        if not self.reset and not self.finished:
            self.reset = True
            self._chunks.clear()
            self.on_due()

    def expect(self, offset: int, length: int) -> None:
        """Check the header of DATA before any of its payload is looked at."""
        if offset > self.received:
            raise ProtocolError(f"data at {offset} leaves a gap after {self.received}")
        if offset + length > self.consumed + self.window:
            raise ProtocolError(f"data up to {offset + length} overruns the window")
        if self.fin_at is not None and offset + length > self.fin_at:
            raise ProtocolError(f"data up to {offset + length} after the end at {self.fin_at}")

    def accept(self, offset: int, data: memoryview) -> None:
        """Payload, perhaps a part of a frame's; what was received before is skipped."""
        data = data[self.received - offset :]
        if not data:
            return
        self.received += len(data)
        if self.reset:
            return
        self._chunks.append(data)
        try:
            self.on_readable()
        finally:
            self._keep()

    def accept_fin(self, offset: int) -> None:
        if offset != (self.received if self.fin_at is None else self.fin_at):
            raise ProtocolError(f"end at {offset} after {self.received} bytes")
        if self.fin_at is None:
            self.fin_at = offset
            if not self.reset:
                self.on_readable()

    def _keep(self) -> None:
        """What the consumer left lies in the transport's buffer, which is used again at once."""
        if not self._chunks:
            return
        kept = bytes(self._chunks.pop())
        if self._chunks and len(self._chunks[-1]) + len(kept) <= MERGE_BYTES:
            kept = b"".join((self._chunks.pop(), kept))
        self._chunks.append(memoryview(kept))


class Stream:
    """Two directions under one number."""

    def __init__(self, number: int, window: int = WINDOW) -> None:
        self.number = number
        self.sender = Sender(window)
        self.receiver = Receiver(window)

    def export(self) -> StreamState:
        sender, receiver = self.sender, self.receiver
        return StreamState(
            stream=self.number,
            window=sender.window,
            acked=min(sender.acked, sender.end),
            unacked=sender.unacked(),
            fin=sender.fin,
            fin_acked=sender.finished,
            refused=sender.reset,
            consumed=receiver.consumed,
            finished=receiver.finished,
            refusing=receiver.reset,
        )

    @classmethod
    def restore(cls, state: StreamState) -> "Stream":
        """:raises ProtocolError: the state contradicts itself (it came from another host)."""
        if state.fin_acked and (state.unacked or not state.fin):
            raise ProtocolError(f"stream {state.stream}: acknowledged to the end, but data is left")
        stream = cls(state.stream, state.window)
        sender, receiver = stream.sender, stream.receiver
        sender.acked = sender.end = state.acked
        sender.write(state.unacked)
        sender.fin = state.fin
        sender.acked += state.fin_acked
        # All of it may have been sent before; the other end's HELLO tells.
        sender.sent = sender.end + sender.fin
        sender.reset = state.refused
        receiver.received = receiver.taken = receiver.consumed = state.consumed
        receiver.finished = state.finished
        receiver.fin_at = state.consumed if state.finished else None
        receiver.reset = state.refusing
        return stream
