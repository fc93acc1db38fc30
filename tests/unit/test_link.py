"""Packets between migd and its guards and keepers, with the descriptors that go along."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import guestwords
from agent.link import (
    MAX_FDS,
    Attach,
    Departed,
    EndGuest,
    Link,
    NeedLifeline,
    Offer,
    Owner,
    Packet,
    Progress,
    StartDeparture,
    TreeIds,
    connect,
    in_doubt,
    listen,
    take_stdin,
)

OFFER = Offer(
    transaction="t1",
    guest="t1-node1",
    home="node1",
    source="node1",
    owner=Owner("alice", 1001, 1001, (1001, 100)),
    ids=TreeIds(6699, 6000, 6699, 6000),
    epoch=1,
    memory_bytes=1 << 20,
    machine="x86_64",
    cpu_features=("sse", "avx"),
    criu_version="4.2.1",
    hostname="node1",
    view=("/home",),
    command="python3 simulate.py",
)
START = StartDeparture(OFFER, "node2", "boot-of-node2", 123456, 6699, 64 << 20)


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(Link(left)), contextlib.closing(Link(right)):
        yield Link(left), Link(right)


def test_packets_keep_their_type_order_and_contents(links: tuple[Link, Link]) -> None:
    sent: list[Packet] = [
        START,
        Attach("lifeline", "node2"),
        Progress("dumped", 7, 48.5),
        EndGuest("evicted"),
    ]
    for packet in sent:
        assert links[0].send(packet)
    assert [links[1].receive() for _ in sent] == [(packet, []) for packet in sent]


def test_descriptors_go_along_and_no_child_inherits_them(links: tuple[Link, Link]) -> None:
    reading, writing = os.pipe()
    assert links[0].send(Attach("bulk", "node2"), (writing, reading))
    received = links[1].receive()
    assert received is not None
    packet, (theirs_out, theirs_in) = received
    assert packet == Attach("bulk", "node2")
    for fd in (reading, writing):
        os.close(fd)
    os.write(theirs_out, b"hello")
    assert os.read(theirs_in, 5) == b"hello"
    for fd in (theirs_in, theirs_out):
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_as_many_descriptors_as_are_allowed_go_through(links: tuple[Link, Link]) -> None:
    assert links[0].send(NeedLifeline("node2"), (0,) * MAX_FDS)
    received = links[1].receive()
    assert received is not None
    assert len(received[1]) == MAX_FDS
    for fd in received[1]:
        os.close(fd)


def test_the_largest_offer_fits_into_a_packet(links: tuple[Link, Link]) -> None:
    offer = msgspec.structs.replace(
        OFFER,
        cpu_features=tuple(f"feature{n}" for n in range(400)),
        view=tuple(f"/{'d' * 200}/{n}" for n in range(100)),
    )
    start = msgspec.structs.replace(START, offer=offer)
    assert links[0].send(start)
    assert links[1].receive() == (start, [])


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"not a packet", 1),
        (msgspec.msgpack.encode(EndGuest("x" * (1 << 17))), 1),
        (msgspec.msgpack.encode(EndGuest("too many descriptors")), MAX_FDS + 1),
    ],
    ids=["garbage", "oversized", "descriptors"],
)
def test_what_is_no_packet_ends_the_link_and_leaves_no_descriptor(
    links: tuple[Link, Link], data: bytes, count: int
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.send_fds(links[0].socket, [data], [0] * count)
    assert links[1].receive() is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_end_of_the_other_side_is_none_and_sending_to_it_false(
    links: tuple[Link, Link],
) -> None:
    links[1].send(EndGuest("last words"))
    links[1].close()
    assert links[0].receive() == (EndGuest("last words"), [])
    assert links[0].receive() is None
    assert not links[0].send(EndGuest("anybody there?"))


def test_nothing_to_receive_is_told_from_the_end(links: tuple[Link, Link]) -> None:
    links[0].socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        links[0].receive()


def test_a_link_can_be_waited_for(links: tuple[Link, Link]) -> None:
    assert links[0].fileno() == links[0].socket.fileno()


def test_a_listener_is_for_root_only_and_takes_a_dead_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen(path):
        pass
    with listen(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_ISSOCK(path.stat().st_mode)
        with contextlib.closing(connect(path)) as client:
            accepted, _ = listener.accept()
            with contextlib.closing(Link(accepted)) as server:
                client.send(Departed("t1", "node2", 48.0, 7))
                assert server.receive() == (Departed("t1", "node2", 48.0, 7), [])


def test_a_listener_never_blocks(tmp_path: Path) -> None:
    with listen(tmp_path / "socket") as listener, pytest.raises(BlockingIOError):
        listener.accept()


def test_nobody_there_is_an_error_and_leaks_nothing(tmp_path: Path) -> None:
    with listen(tmp_path / "dead"):
        pass
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(ConnectionRefusedError):
        connect(tmp_path / "dead")
    with pytest.raises(FileNotFoundError):
        connect(tmp_path / "never")
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_stdin_is_taken_once_and_dev_null_stands_in_its_place() -> None:
    assert callable(take_stdin)
    program = (
        "import os; from agent.link import Link, take_stdin, EndGuest\n"
        "link = Link(take_stdin()); link.send(EndGuest(os.readlink('/proc/self/fd/0')))\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(Link(ours)) as link:
        with theirs:
            child = subprocess.run(
                [sys.executable, "-c", program],
                stdin=theirs.fileno(),
                timeout=30,
                cwd=Path(__file__).parents[2],
            )
        assert child.returncode == 0
        assert link.receive() == (EndGuest("/dev/null"), [])
        assert link.receive() is None


def test_a_move_in_doubt_says_what_to_wait_for() -> None:
    failed = in_doubt(START, "no answer within 10 seconds")
    assert failed.in_doubt
    assert failed.transaction == "t1"
    assert failed.what == "host node2"
    assert "no answer within 10 seconds" in failed.reason
    assert "migctl recover" in failed.remedy


POSITION = guestwords.StreamPosition(16, 4711, 4000, False)
GUARD_WORDS = [guestwords.Signal(15), guestwords.Signal(10, 7), guestwords.Kill()]
KEEPER_WORDS = [
    guestwords.Started(3, (POSITION,)),
    guestwords.Stopped(20, ((1, 512),)),
    guestwords.Continued(),
    guestwords.Ended(-9),
    guestwords.Ended(255, ((1, 512), (2, 0))),
]


@pytest.mark.parametrize("word", [*GUARD_WORDS, guestwords.GoOn((POSITION,))])
def test_a_keeper_understands_what_guards_say(word: guestwords.ToKeeper) -> None:
    assert guestwords.decode_for_keeper(guestwords.encode(word)) == word


@pytest.mark.parametrize("word", KEEPER_WORDS)
def test_a_guard_understands_what_keepers_say(word: guestwords.ToGuard) -> None:
    assert guestwords.decode_for_guard(guestwords.encode(word)) == word


@pytest.mark.parametrize("word", GUARD_WORDS)
def test_a_keeper_cannot_send_signals_home(word: guestwords.ToKeeper) -> None:
    with pytest.raises(msgspec.ValidationError):
        guestwords.decode_for_guard(guestwords.encode(word))


@pytest.mark.parametrize("word", KEEPER_WORDS)
def test_a_guard_cannot_declare_a_guest_ended(word: guestwords.ToGuard) -> None:
    with pytest.raises(msgspec.ValidationError):
        guestwords.decode_for_keeper(guestwords.encode(word))


@given(st.binary(max_size=60))
def test_garbage_is_no_word(data: bytes) -> None:
    for decode in (guestwords.decode_for_guard, guestwords.decode_for_keeper):
        try:
            word = decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        assert isinstance(word, guestwords.ToGuard | guestwords.ToKeeper)
