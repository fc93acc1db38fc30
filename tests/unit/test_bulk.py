"""The bulk connection: frames in order, a peer that is slow, silent, gone, or hostile."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.bulk import IMAGE, MAX_FRAME, MESSAGE, PAGES, Bulk, parse_image
from agent.link import Aborted, Commit, Dumped, Prepared, Ready, StreamPipe
from agent.reactor import Reactor
from migrate.errors import PeerError

PATIENCE = 5.0


@contextlib.contextmanager
def pair(patience: float = PATIENCE) -> Iterator[tuple[Bulk, Bulk]]:
    """Two ends of one connection, each with its own reactor."""
    left, right = socket.socketpair()
    with Reactor() as first, Reactor() as second:
        ends = [
            Bulk(reactor, name, sock.fileno(), os.dup(sock.detach()), patience)
            for reactor, name, sock in ((first, "node2", left), (second, "node1", right))
        ]
        try:
            yield ends[0], ends[1]
        finally:
            for end in ends:
                end.close()


@contextlib.contextmanager
def hearing(data: bytes, patience: float = PATIENCE, ends: bool = True) -> Iterator[Bulk]:
    """A connection on which the peer has said just this, and then (if it `ends`) left."""
    ours, theirs = socket.socketpair()
    with Reactor() as reactor, theirs:
        theirs.sendall(data)
        if ends:
            theirs.shutdown(socket.SHUT_WR)
        bulk = Bulk(reactor, "node2", ours.fileno(), ours.detach(), patience)
        try:
            yield bulk
        finally:
            bulk.close()


def heard(bulk: Bulk) -> tuple[int, bytes]:
    kind, payload = bulk.receive()
    return kind, bytes(payload)


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack("!BI", kind, len(payload)) + payload


def test_frames_arrive_whole_and_in_order() -> None:
    dumped = Dumped((StreamPipe(16, "pipe:[4711]", True, 65536),), (0, 1))
    with pair() as (left, right):
        left.send_message(dumped)
        left.send_pages(memoryview(b"pages"))
        left.send_image("core-6699.img", b"image")
        left.send_pages(memoryview(b""))
        left.send_message(Commit())
        assert right.receive_message() == dumped
        assert heard(right) == (PAGES, b"pages")
        kind, image = right.receive()
        assert kind == IMAGE
        name, contents = parse_image(image)
        assert (name, bytes(contents)) == ("core-6699.img", b"image")
        assert heard(right) == (PAGES, b"")
        assert right.receive_message() == Commit()
        right.send_message(Ready())
        assert left.receive_message() == Ready()


def test_more_than_any_buffer_goes_through_and_is_counted() -> None:
    block = os.urandom(1 << 20)
    with pair() as (left, right):

        def send() -> None:
            for _ in range(8):
                left.send_pages(memoryview(block))

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(8):
            assert heard(right) == (PAGES, block)
        sender.join(PATIENCE)
        assert left.sent_bytes == 8 * (5 + len(block))


def test_while_one_waits_its_reactor_serves_the_others() -> None:
    with hearing(b"", ends=False) as bulk:
        seen: list[str] = []
        bulk._reactor.call_later(0, lambda: seen.append("timer"))
        with pytest.raises(PeerError, match=r"host node2: no answer within 0\.05 seconds"):
            bulk.receive(0.05)
        assert seen == ["timer"]


def test_half_a_frame_is_not_an_answer() -> None:
    whole = frame(PAGES, b"x" * 1000)
    for end in (1, 4, 5, 6, len(whole) - 1):
        with hearing(whole[:end], ends=False) as bulk, pytest.raises(PeerError, match="no answer"):
            bulk.receive(0.01)


def test_a_peer_that_leaves_within_a_frame_is_noticed_at_once() -> None:
    whole = frame(MESSAGE, b"\x81\xa4type\xa5ready")
    for end in range(len(whole)):
        with hearing(whole[:end]) as bulk, pytest.raises(PeerError, match="closed the connection"):
            bulk.receive()


def test_frames_before_the_end_are_still_heard() -> None:
    with hearing(frame(PAGES, b"a") + frame(PAGES, b"b")) as bulk:
        assert heard(bulk) == (PAGES, b"a")
        assert heard(bulk) == (PAGES, b"b")
        with pytest.raises(PeerError, match="closed the connection"):
            bulk.receive()


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 0xFFFFFFFF])
def test_an_oversized_frame_is_refused_before_it_is_read(length: int) -> None:
    with hearing(struct.pack("!BI", PAGES, length), ends=False) as bulk:
        with pytest.raises(PeerError, match="breaks the protocol"):
            bulk.receive(PATIENCE)
        assert len(bulk._buffer) == 0


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_unknown_kinds_are_refused(kind: int) -> None:
    with hearing(frame(kind, b"")) as bulk, pytest.raises(PeerError, match="breaks the protocol"):
        bulk.receive()


@pytest.mark.parametrize("kind", [PAGES, IMAGE])
def test_where_a_message_is_due_nothing_else_counts(kind: int) -> None:
    with hearing(frame(kind, b"")) as bulk, pytest.raises(PeerError, match="breaks the protocol"):
        bulk.receive_message()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x81\xa4type\xa5ready\x00",
        b"\x81\xa4type\xa5steal",
        b"\x81\xa4type\xa6dumped",
        b"\x80",
        b"\x90",
    ],
)
def test_a_message_that_makes_no_sense_is_the_peers_fault(payload: bytes) -> None:
    with hearing(frame(MESSAGE, payload)) as bulk:
        with pytest.raises(PeerError, match="host node2: its message makes no sense") as refusal:
            bulk.receive_message()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x83\xa4type\xa7aborted\xa4what\xa1\xff\xa6reason\xa0",
        b"\x82\xa4type\xa5ready\xa1x" + b"\x91" * 100_000 + b"\x01",
    ],
    ids=["text that is not UTF-8", "too deep"],
)
def test_what_msgspec_calls_otherwise_is_the_peers_fault_too(payload: bytes) -> None:
    with hearing(frame(MESSAGE, payload)) as bulk, pytest.raises(PeerError):
        bulk.receive_message()


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_garbage_ends_in_a_frame_or_a_peer_error(data: bytes) -> None:
    with hearing(data) as bulk:
        at = 0
        with contextlib.suppress(PeerError):
            while True:
                kind, payload = heard(bulk)
                assert data[at : at + 5 + len(payload)] == frame(kind, payload)
                at += 5 + len(payload)


def test_a_peer_that_takes_nothing_is_given_up() -> None:
    with pair(patience=0.05) as (left, _):
        block = memoryview(bytes(1 << 20))
        with pytest.raises(PeerError, match=r"host node2: takes nothing for 0\.05 seconds"):
            for _ in range(64):
                left.send_pages(block)


def test_writing_to_a_peer_that_is_gone_is_a_peer_error() -> None:
    with pair() as (left, right):
        right.close()
        with pytest.raises(PeerError, match="host node2: connection lost"):
            left.send_message(Prepared())


def test_close_gives_every_descriptor_back_once() -> None:
    held, other = os.pipe()
    with Reactor() as reactor:
        ours, theirs = socket.socketpair()
        with theirs:
            bulk = Bulk(reactor, "node2", ours.fileno(), ours.detach(), 1, extra_fd=held)
            bulk.close()
            assert theirs.recv(1) == b""
            taken = os.dup(other)  # takes the lowest free number, which a second close would hit
            bulk.close()
            os.fstat(taken)
    with pytest.raises(BrokenPipeError):
        os.write(other, b"x")
    os.close(other)
    os.close(taken)


def test_a_refusal_keeps_its_three_parts() -> None:
    refusal = Aborted("image", "it is odd", "try again")
    with pair() as (left, right):
        right.send_message(refusal)
        assert left.receive_message() == refusal


def image_frame(name: bytes, contents: bytes = b"") -> bytearray:
    return bytearray(bytes([len(name)]) + name + contents)


@pytest.mark.parametrize(
    "name", ["core-6699.img", "pstree.img", "tmpfs-dev-42.tar.gz.img", "fdinfo-2.img"]
)
def test_names_of_images_pass(name: str) -> None:
    parsed, contents = parse_image(image_frame(name.encode(), b"\0\xff"))
    assert (parsed, bytes(contents)) == (name, b"\0\xff")


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b".img",
        b"..",
        b"../core-1.img",
        b"/etc/passwd",
        b"/etc/cron.d/x.img",
        b"a/b.img",
        b"a/../../b.img",
        b"core-1.img\n",
        b"core-1.img\0",
        b"core\0-1.img",
        b"core-1.img.so",
        b"core 1.img",
        b"-rf.img",
        b".hidden.img",
        b"C\xc3\xb6re.img",
        b"\xff.img",
        b"x" * 102 + b".img",
        b"restore.log",
        b"parent",
    ],
)
def test_other_names_are_refused(name: bytes) -> None:
    with pytest.raises(PeerError, match="is no name of an image") as refusal:
        parse_image(image_frame(name))
    assert "\n" not in str(refusal.value)


@given(st.binary(max_size=150))
def test_whatever_name_passes_stays_in_its_directory(data: bytes) -> None:
    try:
        name, contents = parse_image(bytearray(data))
    except PeerError:
        return
    assert name.endswith(".img")
    assert "/" not in name and not name.startswith((".", "-"))
    assert bytes(contents) == data[1 + len(name) :]


@pytest.mark.parametrize("length", [9, 14, 255])
def test_a_name_longer_than_its_frame_is_refused(length: int) -> None:
    with pytest.raises(PeerError):
        parse_image(bytearray(bytes([length]) + b"core.img"[:-1]))
