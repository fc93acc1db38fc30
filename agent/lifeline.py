"""The one resumable connection between a guard and a keeper.

`Mux` turns streams into frames and back, without descriptors; `Lifeline` binds it to the transport
of the moment. Transports come and go, and so do keepers: the streams stay.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

import msgspec

from agent import wire
from agent.reactor import BROKEN, READ, WRITE, Reactor, Timer
from agent.wire import HEADER, Hello, LifelineState, Position, ProtocolError, Receiver, Stream
from migrate.errors import PeerError
from migrate.framing import MALFORMED

CONTROL: Final = 0
"""The stream of the messages."""
MAX_MESSAGE: Final = 1 << 18
QUANTUM: Final = 1 << 16
"""Most bytes of one stream before it is the next one's turn."""
BATCH: Final = 1 << 18
READ_BYTES: Final = 1 << 18
VECTORS: Final = 512
WRITES_A_TURN: Final = 8
HEARTBEAT_SECONDS: Final = 5.0
SILENT_PINGS: Final = 3
"""So many heartbeats without any sign of life, and the transport counts as lost."""

OnMessage = Callable[[bytes], bool | None]

_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode


class _Messages:
    """Cuts the control stream into messages; each is consumed once its callback has returned."""

    def __init__(self, receiver: Receiver, on_message: OnMessage) -> None:
        self._receiver = receiver
        self._on_message = on_message
        self._buffer = bytearray()
        self.delivering = False
        receiver.on_readable = self._read

    def _read(self) -> None:
        while view := self._receiver.peek():
            self._buffer += view
            self._receiver.take(len(view))
        self.retry()

    def retry(self) -> None:
        """Deliver what is there; one that its callback puts off stays first, unacknowledged."""
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes")
            if len(self._buffer) < 4 + length:
                return
            message = bytes(self._buffer[4 : 4 + length])
            self.delivering = True
            try:
                if self._on_message(message) is False:
                    return
            finally:
                self.delivering = False
            del self._buffer[: 4 + length]
            self._receiver.consume(self._receiver.consumed + 4 + length)


class Mux:
    """One end of a lifeline, without its transport.

    :param guest: names the guest on both ends.
    :param epoch: number of hops so far.
    :param leads: true at the keeper, whose epoch is the truth; the guard's follows it.
    :param on_message: gets each control message, exactly once over all transports and keepers;
        returns False to put it off until `retry_messages`.
    :param on_up: the other end's HELLO has been accepted, and nothing was sent on its account yet:
        streams that belong to an epoch may be opened and dropped here.
    :param on_pending: there is something to send, `gather` it.
    :param state: go on from here; a new keeper does so with the epoch after the state's.
    :raises ProtocolError: the state is of another guest, or contradicts itself.
    """

    def __init__(
        self,
        guest: str,
        *,
        epoch: int = 0,
        leads: bool,
        on_message: OnMessage,
        on_up: Callable[[], None] = wire.nothing,
        on_pending: Callable[[], None] = wire.nothing,
        state: LifelineState | None = None,
    ) -> None:
        self.guest = guest
        self.epoch = epoch
        self.leads = leads
        self.up = False
        self.streams: dict[int, Stream] = {}
        self._dropped: set[int] = set()
        self._early: dict[int, tuple[int, int]] = {}
        """stream → the last ACK or RESET, which overtook the message that opens it"""
        self._on_up = on_up
        self._on_pending = on_pending
        self._connected = False
        self._transport = 0  # counts transports, so that a callback's detach stops the parser
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        self._ready: dict[int, Stream] = {}  # in the order of their turns
        self._dues: dict[int, Stream] = {}  # streams with an ACK or RESET to send
        self._hello_due = False
        self._ping: int | None = None
        self._pong: int | None = None
        self.rtt_ns: int | None = None
        self._partial = bytearray()
        self._data: tuple[Stream | None, int, int] | None = None  # stream, offset, bytes to come
        if state is not None:
            if state.guest != guest:
                raise ProtocolError("the state of another guest")
            self._dropped.update(state.dropped)
            for stream_state in state.streams:
                self._adopt(Stream.restore(stream_state))
        if CONTROL not in self.streams:
            self.open(CONTROL)
        self._messages = _Messages(self.streams[CONTROL].receiver, on_message)

    # ------------------------------------------------------------------ streams

    def open(self, number: int, window: int = wire.WINDOW) -> Stream:
        """A stream; an existing one is returned as it is. Both ends open it, with the same window.

        The end that asked for it (in a message) writes after the answer, the other one at once.
        """
        if number in self._dropped:
            raise ValueError(f"stream {number} was dropped")
        return self.streams.get(number) or self._adopt(Stream(number, window))

    def drop(self, number: int) -> None:
        """Forget a stream on this end; what still comes for it is discarded, for ever."""
        if number == CONTROL:
            raise ValueError("the control stream stays")
        stream = self.streams.pop(number, None)
        self._dropped.add(number)
        self._ready.pop(number, None)
        self._dues.pop(number, None)
        if stream is not None:
            stream.sender.on_pending = stream.receiver.on_due = wire.nothing

    def release(self, number: int) -> Stream:
        """Take a stream out, to be adopted by the lifeline with the guest's next keeper."""
        stream = self.streams[number]
        self.drop(number)
        return stream

    def adopt(self, stream: Stream) -> None:
        """Go on with a stream that was released from another lifeline.

        Both ends have told each other before what they have of it.
        """
        self._adopt(stream)
        if stream.sender.pending:
            stream.sender.on_pending()

    def retry_messages(self) -> None:
        """Deliver the messages that were put off."""
        self._messages.retry()

    def unheard_messages(self) -> list[bytes]:
        """Messages that the other end has not acknowledged, oldest first."""
        data = self.streams[CONTROL].sender.unacked()
        messages = []
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            messages.append(data[4:end])
            data = data[end:]
        return messages

    def send_message(self, message: bytes) -> None:
        """Queue a control message; it arrives after every ACK and RESET that is due now."""
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(message)} bytes")
        self.streams[CONTROL].sender.write(len(message).to_bytes(4, "big") + message)

    def export_state(self) -> LifelineState:
        """Everything that another process needs to go on as this end.

        :raises RuntimeError: a transport is attached (the state would be stale at once), or a
            message is being delivered (it would be delivered twice): defer it.
        """
        if self._connected or self._messages.delivering:
            raise RuntimeError("export_state needs a detached lifeline, outside of on_message")
        streams = tuple(stream.export() for stream in self.streams.values())
        return LifelineState(self.guest, self.epoch, streams, tuple(sorted(self._dropped)))

    def _adopt(self, stream: Stream) -> Stream:
        if len(self.streams) >= wire.MAX_STREAMS:
            raise ValueError("too many streams")
        self.streams[stream.number] = stream

        def pending() -> None:
            if self.up:
                self._ready.setdefault(stream.number, stream)
                self._on_pending()

        def due() -> None:
            if self.up:
                self._dues[stream.number] = stream
                self._on_pending()

        stream.sender.on_pending = pending
        stream.receiver.on_due = due
        kind, offset = self._early.pop(stream.number, (None, 0))
        if kind == wire.ACK:
            stream.sender.accept_ack(offset)
        elif kind == wire.RESET:
            stream.sender.accept_reset(offset)
        return stream

    # ------------------------------------------------------------------ transports

    def connect(self) -> None:
        """A new transport: HELLO goes out first, and nothing else before the other end's."""
        self.disconnect()
        self._connected = True
        self._hello_due = True
        self._on_pending()

    def disconnect(self) -> None:
        """The transport is gone, with whatever was under way."""
        self._transport += 1
        self._connected = self.up = self._hello_due = False
        self._out.clear()
        self._out_bytes = 0
        self._ready.clear()
        self._dues.clear()
        self._ping = self._pong = None
        self._partial.clear()
        self._data = None

    def ping(self) -> None:
        """Ask for a sign of life; the answer sets `rtt_ns`."""
        if self.up:
            self._ping = time.monotonic_ns()
            self._on_pending()

    # ------------------------------------------------------------------ sending

    def gather(self) -> list[bytes | memoryview]:
        """What to write next to the transport, in order; empty when there is nothing."""
        if self._out_bytes < QUANTUM:
            self._fill()
        return list(islice(self._out, VECTORS))

    def written(self, count: int) -> None:
        """The transport took the first `count` bytes of what `gather` returned."""
        self._out_bytes -= count
        while count:
            first = self._out.popleft()
            if len(first) > count:
                self._out.appendleft(memoryview(first)[count:])
                return
            count -= len(first)

    def _fill(self) -> None:
        head = self._urgent()
        if head:
            self._out.append(bytes(head))
            self._out_bytes += len(head)
        while self._ready and self._out_bytes < BATCH:
            number = CONTROL if CONTROL in self._ready else next(iter(self._ready))
            stream = self._ready.pop(number)
            self._frame(stream)
            if stream.sender.pending:
                self._ready[number] = stream  # last in the queue

    def _urgent(self) -> bytearray:
        """Everything but data, each kind at most once: a flood of PINGs does not pile up."""
        head = bytearray()
        if self._hello_due:
            self._hello_due = False
            positions = tuple(Position(n, s.receiver.position) for n, s in self.streams.items())
            hello = _encode(Hello(wire.MAGIC, self.guest, self.epoch, positions))
            head += HEADER.pack(wire.HELLO, 0, 0, len(hello)) + hello
        if self._pong is not None:
            head += HEADER.pack(wire.PONG, 0, self._pong, 0)
            self._pong = None
        if self._ping is not None:
            head += HEADER.pack(wire.PING, 0, self._ping, 0)
            self._ping = None
        for number, stream in self._dues.items():
            kind = wire.RESET if stream.receiver.reset else wire.ACK
            head += HEADER.pack(kind, number, stream.receiver.acknowledged, 0)
        self._dues.clear()
        return head

    def _frame(self, stream: Stream) -> None:
        sender = stream.sender
        if not sender.pending:
            return
        offset = sender.sent
        if views := sender.next_data(QUANTUM):
            length = sender.sent - offset
            self._out.append(HEADER.pack(wire.DATA, stream.number, offset, length))
            self._out.extend(views)
            self._out_bytes += HEADER.size + length
        if sender.next_fin():
            self._out.append(HEADER.pack(wire.FIN, stream.number, sender.end, 0))
            self._out_bytes += HEADER.size

    # ------------------------------------------------------------------ receiving

    def feed(self, data: memoryview) -> None:
        """Bytes of the transport, cut anywhere.

        :raises ProtocolError: the other end is wrong; the transport must be given up.
        """
        transport = self._transport
        while data and transport == self._transport:
            data = self._feed_frame(data) if self._data is None else self._feed_data(data)

    def _feed_data(self, data: memoryview) -> memoryview:
        """Payload of DATA is passed on as it comes; so a cut costs only what had not arrived."""
        assert self._data is not None
        stream, offset, left = self._data
        piece, rest = data[:left], data[left:]
        left -= len(piece)
        self._data = (stream, offset + len(piece), left) if left else None
        if stream is not None and stream.number in self.streams:
            stream.receiver.accept(offset, piece)
        return rest

    def _feed_frame(self, data: memoryview) -> memoryview:
        """One frame other than the payload of DATA, or the part of it that is there."""
        if not self._partial and len(data) >= HEADER.size:
            head: memoryview | bytearray = data
        else:
            missing = HEADER.size - len(self._partial)
            if missing > 0:
                self._partial += data[:missing]
                data = data[missing:]
                if len(self._partial) < HEADER.size:
                    return data
            head = self._partial
        kind, number, offset, length = HEADER.unpack_from(head)
        if head is data:
            data = data[HEADER.size :]
            if kind == wire.HELLO:
                self._partial += head[: HEADER.size]
        if kind == wire.HELLO:
            if self.up or length > wire.MAX_HELLO:
                raise ProtocolError("a HELLO that is too long or not the first frame")
            missing = HEADER.size + length - len(self._partial)
            self._partial += data[:missing]
            data = data[missing:]
            if len(self._partial) == HEADER.size + length:
                hello = bytes(self._partial[HEADER.size :])
                self._partial.clear()
                self._greeted(hello)
            return data
        self._partial.clear()
        if not self.up:
            raise ProtocolError("the first frame is no HELLO")
        self._dispatch(kind, number, offset, length)
        return data

    def _dispatch(self, kind: int, number: int, offset: int, length: int) -> None:
        if length > (wire.MAX_PAYLOAD if kind == wire.DATA else 0):
            raise ProtocolError(f"a frame of type {kind} with {length} bytes")
        if kind == wire.PING:
            self._pong = offset
            self._on_pending()
            return
        if kind == wire.PONG:
            self.rtt_ns = max(0, time.monotonic_ns() - offset)
            return
        stream = self.streams.get(number)
        if stream is None and number not in self._dropped:
            if kind not in (wire.ACK, wire.RESET) or len(self._early) >= wire.MAX_STREAMS:
                raise ProtocolError(f"stream {number} is not open")
            self._early[number] = (kind, offset)
            return
        if kind == wire.DATA:
            if stream is not None:
                stream.receiver.expect(offset, length)
            self._data = (stream, offset, length) if length else None
        elif kind not in (wire.ACK, wire.FIN, wire.RESET):
            raise ProtocolError(f"unknown frame type {kind}")
        elif stream is None:
            return
        elif kind == wire.ACK:
            stream.sender.accept_ack(offset)
        elif kind == wire.FIN:
            stream.receiver.accept_fin(offset)
        else:
            stream.sender.accept_reset(offset)

    def _greeted(self, payload: bytes) -> None:
        try:
            hello = _decode_hello(payload)
        except MALFORMED as error:
            raise ProtocolError(f"malformed HELLO: {error}") from error
        if hello.magic != wire.MAGIC:
            raise ProtocolError("another version of the lifeline")
        if hello.guest != self.guest:
            raise ProtocolError("the lifeline of another guest")
        if hello.epoch > self.epoch if self.leads else hello.epoch < self.epoch:
            raise ProtocolError(f"epoch {hello.epoch} against {self.epoch}: a keeper of the past")
        received = {position.stream: position.received for position in hello.positions}
        for number, stream in self.streams.items():
            # Not listed: the other end has not opened it yet, or has dropped it. Listed, but not
            # open here: a message that opens it is on its way, with the same position.
            stream.sender.rewind(received.get(number, stream.sender.acked))
        if not self.leads:
            self.epoch = hello.epoch
        self.up = True
        for number, stream in self.streams.items():
            if stream.sender.pending:
                self._ready[number] = stream
            # The last ACK or RESET may have been lost with the old transport.
            if stream.receiver.acknowledged or stream.receiver.reset:
                self._dues[number] = stream
        self._on_pending()
        self._on_up()


class Lifeline:
    """A `Mux` on the transport of the moment, driven by a reactor.

    `on_up` as in `Mux`; `on_down` gets the reason when a transport was lost or, with a
    ProtocolError, given up; `detach` does not call it. The remaining parameters are those of `Mux`.

    :param ping_seconds: after so long without a sign of life PING is sent; 0: never.
    """

    def __init__(
        self,
        reactor: Reactor,
        guest: str,
        *,
        epoch: int = 0,
        leads: bool,
        on_message: OnMessage,
        on_up: Callable[[], None] = wire.nothing,
        on_down: Callable[[PeerError], None] = lambda reason: None,
        ping_seconds: float = HEARTBEAT_SECONDS,
        state: LifelineState | None = None,
    ) -> None:
        self._reactor = reactor
        self._on_down = on_down
        self._ping_seconds = ping_seconds
        self._in = self._out = -1
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._flush_deferred = False
        self._writing = False  # epoll is asked for WRITE
        self._heartbeat: Timer | None = None
        self.last_heard = time.monotonic()
        """time.monotonic() when the other end was last heard, or of the birth of this object."""
        self.mux = Mux(
            guest,
            epoch=epoch,
            leads=leads,
            on_message=on_message,
            on_up=on_up,
            on_pending=self._pending,
            state=state,
        )
        self.open = self.mux.open
        self.drop = self.mux.drop
        self.send_message = self.mux.send_message
        self.export_state = self.mux.export_state

    @property
    def attached(self) -> bool:
        return self._in >= 0

    @property
    def up(self) -> bool:
        """Attached, and the two ends have greeted each other."""
        return self.mux.up

    @property
    def epoch(self) -> int:
        return self.mux.epoch

    def attach(self, fd_in: int, fd_out: int) -> None:
        """Go on over this transport, in place of any other; the descriptors are ours from now on.

        They become non-blocking, and may be the same.

        :raises OSError: they cannot be waited for; they still belong to the caller.
        """
        self.detach()
        for fd in {fd_in, fd_out}:
            os.set_blocking(fd, False)
        self._reactor.register(fd_in, READ, self._readable)
        if fd_out != fd_in:
            try:
                self._reactor.register(fd_out, 0, self._writable)
            except OSError:
                self._reactor.unregister(fd_in)
                raise
        self._in, self._out = fd_in, fd_out
        self._writing = False
        self.mux.connect()
        self.last_heard = time.monotonic()
        self._schedule_heartbeat()

    def detach(self) -> None:
        """Close the transport, if there is one; `on_down` is not called."""
        if self._in < 0:
            return
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self.mux.disconnect()
        for fd in {self._in, self._out}:
            self._reactor.unregister(fd)
            os.close(fd)
        self._in = self._out = -1

    def ping(self) -> None:
        self.mux.ping()

    def _down(self, reason: PeerError) -> None:
        self.detach()
        self._on_down(reason)

    def _lost(self, reason: str) -> None:
        self._down(PeerError("lifeline", reason))

    def _readable(self, events: int) -> None:
        if events & (READ | BROKEN):
            try:
                count = os.readv(self._in, [self._buffer])
            except BlockingIOError:
                count = -1
            except OSError as error:
                self._lost(os.strerror(error.errno or 0))
                return
            if count == 0:
                self._lost("closed by the other end")
                return
            if count > 0:
                self._heard(count)
        if events & WRITE and self._in == self._out and self._in >= 0:
            self._flush()

    def _heard(self, count: int) -> None:
        try:
            self.mux.feed(self._buffer[:count])
        except ProtocolError as error:
            self._down(error)
            return
        self.last_heard = time.monotonic()

    def _writable(self, events: int) -> None:
        if events & BROKEN:
            self._lost("closed by the other end")
        else:
            self._flush()

    def _pending(self) -> None:
        # Once a turn: all that the turn's events have caused goes out in one write.
        if not self._flush_deferred:
            self._flush_deferred = True
            self._reactor.defer(self._flush)

    def _flush(self) -> None:
        self._flush_deferred = False
        if self._out < 0:
            return
        more = True
        for _ in range(WRITES_A_TURN):
            buffers = self.mux.gather()
            if not buffers:
                more = False
                break
            try:
                self.mux.written(os.writev(self._out, buffers))
            except BlockingIOError:
                break
            except OSError as error:
                self._lost(os.strerror(error.errno or 0))
                return
        if more != self._writing:
            self._writing = more
            base = READ if self._in == self._out else 0
            self._reactor.modify(self._out, base | WRITE if more else base)

    def _schedule_heartbeat(self) -> None:
        if not self._ping_seconds:
            return
        quiet = time.monotonic() - self.last_heard
        if quiet >= SILENT_PINGS * self._ping_seconds:
            self._lost("no sign of life")
            return
        if quiet >= self._ping_seconds:
            self.mux.ping()
            quiet = 0.0
        self._heartbeat = self._reactor.call_later(
            self._ping_seconds - quiet, self._schedule_heartbeat
        )
