"""The lifeline: nothing lost, nothing twice, whatever happens to transports and keepers."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import wire
from agent.lifeline import MAX_MESSAGE, QUANTUM, Lifeline, Mux
from agent.reactor import Reactor
from agent.wire import HEADER, Hello, LifelineState, Position, ProtocolError, Stream, StreamState
from migrate.errors import PeerError

WINDOW = 48
NUMBERS = (1, 2)
TEXT = random.Random(1).randbytes(100_000)


class Side:
    """One end of a lifeline with a consumer that takes and consumes in steps."""

    def __init__(self, mux: Mux | None = None, *, leads: bool) -> None:
        self.messages: list[bytes] = []
        self.leads = leads
        self.mux = mux or Mux("guest", leads=leads, on_message=self.messages.append)
        self.output = bytearray()
        self.consumed = {number: bytearray() for number in NUMBERS}
        self.taken = {number: bytearray() for number in NUMBERS}
        for number in NUMBERS:
            self.mux.open(number, WINDOW)

    def hop(self) -> None:
        """Another process goes on with this end; what was taken but not consumed dies with us."""
        self.mux.disconnect()
        state = msgspec.msgpack.decode(
            msgspec.msgpack.encode(self.mux.export_state()), type=LifelineState
        )
        self.mux = Mux(
            "guest",
            epoch=state.epoch + 1,
            leads=self.leads,
            on_message=self.messages.append,
            state=state,
        )
        self.taken = {number: bytearray() for number in NUMBERS}

    def write(self, number: int, count: int) -> None:
        sender = self.mux.streams[number].sender
        count = min(count, sender.room)
        sender.write(TEXT[sender.end : sender.end + count])

    def consume(self, number: int, count: int) -> None:
        """Take `count` bytes, and consume half of all that was taken so far."""
        receiver = self.mux.streams[number].receiver
        while count and (view := receiver.peek()):
            piece = view[:count]
            self.taken[number] += piece
            receiver.take(len(piece))
            count -= len(piece)
        half = (len(self.taken[number]) + 1) // 2
        self.consumed[number] += self.taken[number][:half]
        del self.taken[number][:half]
        receiver.consume(receiver.consumed + half)
        if receiver.at_end and not self.taken[number] and not receiver.finished:
            receiver.finish()

    def emit(self, count: int) -> None:
        """Write at most `count` bytes to the transport."""
        data = b"".join(self.mux.gather())[:count]
        self.mux.written(len(data))
        self.output += data

    def deliver(self, other: "Side", count: int) -> None:
        data = bytes(self.output[:count])
        del self.output[:count]
        scratch = bytearray(data)
        other.mux.feed(memoryview(scratch))
        scratch[:] = bytes(len(scratch))  # as the next read does: nobody may hold on to it


def connect(a: Side, b: Side) -> None:
    for side in (a, b):
        side.output.clear()
        side.mux.connect()


def settle(a: Side, b: Side) -> None:
    """Until nothing moves any more."""
    while True:
        for side in (a, b):
            side.emit(1 << 20)
        if not a.output and not b.output:
            return
        a.deliver(b, 1 << 20)
        b.deliver(a, 1 << 20)
        for side in (a, b):
            for number in NUMBERS:
                for _ in range(8):
                    side.consume(number, 1 << 20)


SIDES = st.sampled_from((0, 1))
STEP = st.one_of(
    st.tuples(st.just("write"), SIDES, st.sampled_from(NUMBERS), st.integers(1, 60)),
    st.tuples(st.just("consume"), SIDES, st.sampled_from(NUMBERS), st.integers(0, 60)),
    st.tuples(st.just("emit"), SIDES, st.just(0), st.integers(1, 150)),
    st.tuples(st.just("deliver"), SIDES, st.just(0), st.integers(1, 150)),
    st.tuples(st.just("message"), SIDES, st.just(0), st.integers(0, 40)),
    st.tuples(st.just("exchange"), st.just(0), st.just(0), st.integers(1, 400)),
    st.tuples(st.just("cut"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("hop"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("finish"), SIDES, st.sampled_from(NUMBERS), st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=120))
def test_every_byte_arrives_once_and_in_order_over_cuts_and_hops(
    steps: list[tuple[str, int, int, int]],
) -> None:
    with mock.patch.object(wire, "MERGE_BYTES", 8):  # so that there are many pieces
        play(steps)


def play(steps: list[tuple[str, int, int, int]]) -> None:
    guard, keeper = Side(leads=False), Side(leads=True)
    sides = (guard, keeper)
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    connect(guard, keeper)
    for action, which, number, count in steps:
        side, other = sides[which], sides[1 - which]
        if action == "write":
            side.write(number, count)
        elif action == "consume":
            side.consume(number, count)
        elif action == "emit":
            side.emit(count)
        elif action == "deliver":
            side.deliver(other, count)
        elif action == "message":
            message = TEXT[:count] + bytes([len(sent[which]) % 256])
            sent[which].append(message)
            side.mux.send_message(message)
        elif action == "exchange":
            for one, two in (sides, sides[::-1]):
                one.emit(count)
                one.deliver(two, count)
        elif action == "cut":
            connect(guard, keeper)
        elif action == "hop":
            keeper.hop()
            connect(guard, keeper)
        else:
            side.mux.streams[number].sender.finish()
        for one in sides:
            for stream in one.mux.streams.values():
                if stream.number in NUMBERS:
                    assert stream.receiver.received - stream.receiver.consumed <= WINDOW
    for side in sides:
        for number in NUMBERS:
            side.mux.streams[number].sender.finish()
    connect(guard, keeper)
    settle(guard, keeper)
    for which, (one, two) in enumerate((sides, sides[::-1])):
        assert two.messages == sent[which]
        for number in NUMBERS:
            sender = one.mux.streams[number].sender
            assert bytes(two.consumed[number]) == TEXT[: sender.end]
            assert sender.finished
            assert two.mux.streams[number].receiver.finished
    assert guard.mux.epoch == keeper.mux.epoch


@pytest.fixture
def pair() -> tuple[Side, Side]:
    guard, keeper = Side(leads=False), Side(leads=True)
    connect(guard, keeper)
    settle(guard, keeper)
    return guard, keeper


def frame(kind: int, number: int = 1, offset: int = 0, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, number, offset, len(payload)) + payload


def hello(guest: str = "guest", epoch: int = 0, *positions: Position, magic: str = "") -> bytes:
    greeting = Hello(magic or wire.MAGIC, guest, epoch, positions)
    return frame(wire.HELLO, 0, 0, msgspec.msgpack.encode(greeting))


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (frame(9), "unknown frame type"),
        (frame(0), "unknown frame type"),
        (HEADER.pack(wire.DATA, 1, 0, wire.MAX_PAYLOAD + 1), "with 1048577 bytes"),
        (HEADER.pack(wire.ACK, 1, 0, 1), "with 1 bytes"),
        (HEADER.pack(wire.PING, 0, 0, 1), "with 1 bytes"),
        (frame(wire.DATA, 1, 1, b"x"), "gap"),
        (frame(wire.DATA, 1, 2**64 - 1, b"x"), "gap"),
        (HEADER.pack(wire.DATA, 1, 0, WINDOW + 1), "overruns the window"),
        (frame(wire.DATA, 77, 0, b"x"), "not open"),
        (frame(wire.FIN, 77, 0), "not open"),
        (frame(wire.ACK, 1, 1), "acknowledges byte 1 of 0"),
        (frame(wire.RESET, 1, 1), "acknowledges byte 1 of 0"),
        (frame(wire.FIN, 1, 1), "end at 1"),
        (frame(wire.FIN, 1, 0) + frame(wire.DATA, 1, 0, b"x"), "after the end"),
        (frame(wire.DATA, 1, 0, b"xy") + frame(wire.FIN, 1, 1), "end at 1"),
        (hello(), "not the first frame"),
        (frame(wire.DATA, 0, 0, (MAX_MESSAGE + 1).to_bytes(4, "big")), "a message of"),
    ],
)
def test_a_frame_that_breaks_the_protocol_is_refused(
    pair: tuple[Side, Side], attack: bytes, reason: str
) -> None:
    with pytest.raises(ProtocolError, match=reason):
        pair[0].mux.feed(memoryview(attack))


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (frame(wire.DATA, 1, 0, b"x"), "no HELLO"),
        (frame(wire.PING, 0), "no HELLO"),
        (HEADER.pack(wire.HELLO, 0, 0, wire.MAX_HELLO + 1), "too long"),
        (frame(wire.HELLO, 0, 0, b"\xc1"), "malformed"),
        (frame(wire.HELLO, 0, 0, msgspec.msgpack.encode((wire.MAGIC, "guest", -1, ()))), "malf"),
        (hello(magic="other"), "another version"),
        (hello("somebody"), "another guest"),
        (hello("guest", 2), "keeper of the past"),
        (hello("guest", 0, Position(1, 1)), "has 1 bytes, not 0 to 0"),
    ],
)
def test_a_wrong_greeting_is_refused(first: bytes, reason: str) -> None:
    keeper = Side(leads=True)
    keeper.mux.connect()
    with pytest.raises(ProtocolError, match=reason):
        keeper.mux.feed(memoryview(first))


def test_a_guard_refuses_the_keeper_before_the_last_hop(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    old = Side(leads=True)
    keeper.hop()
    connect(guard, keeper)
    settle(guard, keeper)
    assert guard.mux.epoch == 1
    connect(guard, old)
    old.emit(1 << 20)
    with pytest.raises(ProtocolError, match="keeper of the past"):
        old.deliver(guard, 1 << 20)


def test_a_greeting_that_lost_acknowledged_bytes_is_refused(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    guard.write(1, 10)
    settle(guard, keeper)
    guard.mux.connect()
    with pytest.raises(ProtocolError, match="has 3 bytes, not 10 to 10"):
        guard.mux.feed(memoryview(hello("guest", 0, Position(1, 3))))


def test_data_sent_again_is_dropped_silently(pair: tuple[Side, Side]) -> None:
    guard, _ = pair
    receiver = guard.mux.streams[1].receiver
    for attempt in (b"abc", b"abcde", b"ab"):
        guard.mux.feed(memoryview(frame(wire.DATA, 1, 0, attempt)))
    assert b"".join(take_all(guard, 1)) == b"abcde"
    assert receiver.received == 5


def take_all(side: Side, number: int) -> Iterator[bytes]:
    receiver = side.mux.streams[number].receiver
    while view := receiver.peek():
        yield bytes(view)
        receiver.take(len(view))


def test_a_sender_stops_at_the_window_until_something_is_consumed(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    sender = guard.mux.streams[1].sender
    sender.write(TEXT[:WINDOW])
    assert sender.room == 0
    guard.emit(1 << 20)
    guard.deliver(keeper, 1 << 20)
    keeper.emit(1 << 20)
    assert not keeper.output  # received is not consumed
    keeper.consume(1, 2)
    keeper.emit(1 << 20)
    keeper.deliver(guard, 1 << 20)
    assert sender.room == 1


def test_a_reset_survives_the_loss_of_the_transport_that_carried_it(
    pair: tuple[Side, Side],
) -> None:
    guard, keeper = pair
    resets: list[str] = []
    keeper.mux.streams[1].sender.on_reset = lambda: resets.append("reset")
    keeper.write(1, 10)
    keeper.emit(1 << 20)
    keeper.deliver(guard, 1 << 20)
    guard.consume(1, 6)
    guard.mux.streams[1].receiver.refuse()
    guard.emit(1 << 20)  # and never arrives
    connect(guard, keeper)
    settle(guard, keeper)
    connect(guard, keeper)
    settle(guard, keeper)
    assert resets == ["reset"]
    assert keeper.mux.streams[1].sender.room == 0
    assert keeper.mux.streams[1].sender.acked == 6  # what had been taken before


def test_a_reset_survives_a_hop_on_either_end(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    keeper.mux.streams[1].receiver.refuse()
    guard.mux.streams[2].receiver.refuse()
    keeper.hop()
    connect(guard, keeper)
    settle(guard, keeper)
    assert guard.mux.streams[1].sender.reset
    assert keeper.mux.streams[2].sender.reset
    keeper.hop()
    assert keeper.mux.streams[1].receiver.reset
    assert keeper.mux.streams[2].sender.reset


def test_what_overtakes_the_message_that_opens_a_stream_is_not_lost(
    pair: tuple[Side, Side],
) -> None:
    guard, keeper = pair
    for number in (7, 8):
        guard.mux.open(number).receiver.refuse()
    guard.mux.send_message(b"open 7 and 8")
    settle(guard, keeper)
    connect(guard, keeper)  # repeats them, still before the streams are open
    settle(guard, keeper)
    assert keeper.messages == [b"open 7 and 8"]
    resets: list[int] = []
    sender = keeper.mux.open(7).sender
    sender.on_reset = lambda: resets.append(7)
    assert sender.reset
    stream = Stream(8, WINDOW)
    stream.sender.on_reset = lambda: resets.append(8)
    keeper.mux.adopt(stream)
    assert resets == [8]


def test_an_early_word_about_a_stream_must_fit_it(pair: tuple[Side, Side]) -> None:
    mux = pair[0].mux
    mux.feed(memoryview(frame(wire.ACK, 77, 1)))
    with pytest.raises(ProtocolError, match="acknowledges byte 1 of 0"):
        mux.open(77)


def test_a_stream_moves_on_while_the_transport_is_made_anew() -> None:
    """Home has adopted it already, its keeper not yet."""
    guard, keeper = Side(leads=False), Side(leads=True)
    moved = Stream(7, WINDOW)
    moved.receiver.accept(0, memoryview(b"abc"))
    guard.mux.adopt(moved)
    connect(guard, keeper)
    settle(guard, keeper)
    assert keeper.mux.up


def test_control_messages_and_acks_overtake_a_bulk_stream(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    for side in pair:
        side.mux.open(9)
    guard.mux.streams[9].sender.write(bytes(1 << 20))
    guard.emit(1 << 20)  # one batch is on its way
    batch = len(guard.output)
    guard.mux.send_message(b"urgent")
    guard.emit(1 << 20)
    guard.deliver(keeper, batch + QUANTUM)
    assert keeper.messages == [b"urgent"]


def test_streams_take_turns(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    for number in (9, 10):
        for side in pair:
            side.mux.open(number)
        guard.mux.streams[number].sender.write(bytes(1 << 20))
    guard.emit(1 << 20)
    guard.deliver(keeper, 1 << 20)
    received = [keeper.mux.streams[number].receiver.received for number in (9, 10)]
    assert min(received) > 0
    assert abs(received[0] - received[1]) <= QUANTUM


def test_a_flood_of_pings_is_answered_once_a_write(pair: tuple[Side, Side]) -> None:
    guard, _ = pair
    guard.mux.feed(memoryview(frame(wire.PING, 0, 5) * 10_000))
    assert b"".join(guard.mux.gather()) == frame(wire.PONG, 0, 5)


def test_a_ping_measures_the_round_trip(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    assert guard.mux.rtt_ns is None
    guard.mux.ping()
    settle(guard, keeper)
    assert guard.mux.rtt_ns is not None


def test_an_ack_arrives_before_a_message_sent_after_it(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    order: list[str] = []
    guard.write(1, 10)
    guard.emit(1 << 20)
    guard.deliver(keeper, 1 << 20)
    guard.mux.streams[1].sender.on_ack = lambda: order.append("ack")
    guard.mux.streams[0].receiver.on_readable = lambda: order.append("message")
    keeper.consume(1, 10)
    keeper.mux.send_message(b"exited")
    connect(guard, keeper)  # also over a cut
    for side in pair:
        side.emit(1 << 20)
    keeper.deliver(guard, 1 << 20)
    keeper.emit(1 << 20)
    guard.deliver(keeper, 1 << 20)
    keeper.emit(1 << 20)
    keeper.deliver(guard, 1 << 20)
    assert order == ["ack", "message"]


def test_a_dropped_stream_is_discarded_also_after_a_hop(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    guard.write(1, 10)
    guard.emit(1 << 20)
    keeper.mux.drop(1)
    guard.deliver(keeper, 1 << 20)
    keeper.hop()
    assert 1 not in keeper.mux.streams
    connect(guard, keeper)
    for _ in range(3):
        for one, two in (pair, pair[::-1]):
            one.emit(1 << 20)
            one.deliver(two, 1 << 20)
    assert guard.mux.up
    assert keeper.mux.up
    with pytest.raises(ValueError, match="dropped"):
        keeper.mux.open(1)


def test_a_stream_that_the_other_end_opens_late_begins_at_its_beginning(
    pair: tuple[Side, Side],
) -> None:
    guard, keeper = pair
    keeper.mux.open(9).sender.write(b"early")
    keeper.emit(1 << 20)  # lost
    connect(guard, keeper)
    guard.emit(1 << 20)  # its greeting does not know stream 9
    guard.mux.open(9)
    for one, two in chain([pair, pair[::-1]] * 3):
        one.emit(1 << 20)
        one.deliver(two, 1 << 20)
    assert b"".join(take_all(guard, 9)) == b"early"


def test_more_than_the_window_waits_at_the_sender(pair: tuple[Side, Side]) -> None:
    guard, keeper = pair
    guard.mux.streams[1].sender.write(TEXT[: 3 * WINDOW])
    settle(guard, keeper)
    assert keeper.consumed[1] == TEXT[: 3 * WINDOW]


def test_what_follows_in_the_buffer_is_ignored_after_a_detach() -> None:
    guard = Mux("guest", leads=False, on_message=lambda message: guard.disconnect())
    stream = guard.open(1)
    guard.connect()
    message = frame(wire.DATA, 0, 0, b"\0\0\0\1x")
    guard.feed(memoryview(hello() + message + frame(wire.DATA, 1, 0, b"late")))
    assert guard.streams[0].receiver.consumed == 5
    assert stream.receiver.received == 0


def test_the_state_is_refused_while_it_may_still_change(pair: tuple[Side, Side]) -> None:
    guard, _ = pair
    with pytest.raises(RuntimeError):
        guard.mux.export_state()
    guard.mux.disconnect()
    assert guard.mux.export_state().guest == "guest"


def test_the_state_is_refused_while_a_message_is_delivered() -> None:
    failures: list[str] = []

    def on_message(message: bytes) -> None:
        guard.disconnect()
        try:
            guard.export_state()
        except RuntimeError as error:
            failures.append(str(error))

    guard = Mux("guest", leads=False, on_message=on_message)
    keeper = Mux("guest", leads=True, on_message=lambda message: None)
    guard.connect()
    keeper.connect()
    guard.feed(memoryview(b"".join(keeper.gather())))
    guard.feed(memoryview(frame(wire.DATA, 0, 0, b"\0\0\0\1x")))
    assert len(failures) == 1
    assert guard.export_state().streams[0].consumed == 5


def test_a_contradictory_state_is_refused() -> None:
    state = StreamState(1, WINDOW, 5, b"left", True, True, False, 0, False, False)
    with pytest.raises(ProtocolError, match="data is left"):
        Stream.restore(state)


def test_a_state_of_another_guest_is_refused(pair: tuple[Side, Side]) -> None:
    guard, _ = pair
    guard.mux.disconnect()
    with pytest.raises(ProtocolError, match="another guest"):
        Mux("else", leads=True, on_message=print, state=guard.mux.export_state())


def test_a_window_of_single_bytes_is_kept_in_few_pieces() -> None:
    stream = Stream(1, 1 << 16)
    for _ in range(1 << 16):
        stream.sender.write(b"x")
    assert stream.sender.unacked() == b"x" * (1 << 16)
    assert len(stream.sender.next_data(1 << 16)) <= 32
    for offset in range(1 << 12):
        stream.receiver.accept(offset, memoryview(b"y"))
    assert bytes(stream.receiver.peek()) == b"y" * (1 << 12)


# ---------------------------------------------------------------------- on real descriptors


class Ends:
    """Two lifelines on one reactor, with what happened to them."""

    def __init__(self, reactor: Reactor, ping_seconds: float = 0) -> None:
        self.reactor = reactor
        self.ups = 0
        self.downs: list[PeerError] = []
        self.messages: list[bytes] = []
        self.guard, self.keeper = (
            Lifeline(
                reactor,
                "guest",
                leads=leads,
                on_message=self.messages.append,
                on_up=self._up,
                on_down=self.downs.append,
                ping_seconds=ping_seconds,
            )
            for leads in (False, True)
        )

    def _up(self) -> None:
        self.ups += 1

    def attach(self) -> None:
        a, b = socket.socketpair()
        self.guard.attach(*[a.detach()] * 2)
        self.keeper.attach(*[b.detach()] * 2)

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(100_000):
            if condition():
                return
            self.reactor.turn(1)
        pytest.fail("it never happened")


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Reactor() as reactor:
        ends = Ends(reactor)
        yield ends
        ends.guard.detach()
        ends.keeper.detach()


def test_megabytes_cross_a_socketpair_that_breaks_again_and_again(ends: Ends) -> None:
    total = 8 << 20
    text = random.Random(2).randbytes(total)
    sender = ends.guard.open(1, 1 << 17).sender
    receiver = ends.keeper.open(1, 1 << 17).receiver
    got = bytearray()

    def feed() -> None:
        while sender.room and sender.end < total:
            sender.write(text[sender.end : sender.end + min(sender.room, 50_000)])

    def consume() -> None:
        while view := receiver.peek():
            got.extend(view)
            receiver.take(len(view))
        receiver.consume(receiver.taken)

    sender.on_ack = feed
    receiver.on_readable = consume
    ends.attach()
    feed()
    for part in range(1, 9):
        goal = total * part // 10
        while len(got) < goal:
            ends.reactor.turn(5)
        ends.attach()  # in place of the old one, with all that was on its way
    ends.until(lambda: sender.acked == total)
    assert got == text
    assert ends.ups >= 16


def test_a_lifeline_runs_over_a_pair_of_pipes(ends: Ends) -> None:
    there, back = os.pipe(), os.pipe()
    ends.guard.attach(back[0], there[1])
    ends.keeper.attach(there[0], back[1])
    ends.guard.send_message(b"over pipes" * 20_000)
    ends.until(lambda: ends.messages)
    assert ends.messages == [b"over pipes" * 20_000]


def test_the_end_of_a_transport_is_reported_and_its_descriptors_are_closed(ends: Ends) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    ends.attach()
    ends.until(lambda: ends.guard.up and ends.keeper.up)
    ends.keeper.detach()
    ends.until(lambda: ends.downs)
    assert not isinstance(ends.downs[0], ProtocolError)
    assert not ends.guard.attached
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_garbage_brings_the_transport_down_and_a_good_one_heals_it(ends: Ends) -> None:
    a, b = socket.socketpair()
    with b:
        ends.guard.attach(*[a.detach()] * 2)
        b.send(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        ends.until(lambda: ends.downs)
    assert isinstance(ends.downs[0], ProtocolError)
    ends.guard.send_message(b"still here")
    ends.attach()
    ends.until(lambda: ends.messages)
    assert ends.messages == [b"still here"]


def test_a_file_that_cannot_be_waited_for_is_left_to_the_caller(ends: Ends) -> None:
    end, other = os.pipe()
    with open(os.devnull, "wb") as null:
        with pytest.raises(PermissionError):
            ends.guard.attach(end, null.fileno())
        assert not ends.guard.attached
    os.close(end)
    os.close(other)


def test_a_message_handler_may_detach(ends: Ends) -> None:
    seen: list[bytes] = []

    def on_message(message: bytes) -> None:
        seen.append(message)
        keeper.detach()

    keeper = Lifeline(ends.reactor, "guest", leads=True, on_message=on_message)
    a, b = socket.socketpair()
    ends.guard.attach(*[a.detach()] * 2)
    keeper.attach(*[b.detach()] * 2)
    ends.guard.send_message(b"one")
    ends.until(lambda: ends.downs)
    assert seen == [b"one"]
    assert keeper.export_state().streams[0].consumed == 7


def test_an_idle_lifeline_pings() -> None:
    with Reactor() as reactor:
        ends = Ends(reactor, ping_seconds=0.02)
        ends.attach()
        ends.until(lambda: ends.guard.up)
        heard = ends.guard.last_heard
        ends.until(lambda: ends.guard.mux.rtt_ns is not None)
        assert ends.guard.last_heard > heard
        ends.guard.detach()
        ends.keeper.detach()
