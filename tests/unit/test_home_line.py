"""Home's end of the connection with a keeper: words arrive once, in order, also over a cut."""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from agent import guestwords, view_server
from agent.guestwords import Ended, Kill, Signal, Stopped
from agent.home_line import HomeLine
from agent.lifeline import Lifeline
from agent.link import Owner
from agent.reactor import Reactor
from agent.waiting import wait_until
from migrate.errors import HostError

ALICE = Owner("alice", os.getuid(), os.getgid(), ())
LONG = 30.0


@dataclass
class Ends:
    """A guard's line, and the keeper's end of it."""

    reactor: Reactor
    heard_home: list[guestwords.ToGuard] = field(default_factory=list)
    heard_there: list[guestwords.ToKeeper] = field(default_factory=list)
    downs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.line = HomeLine(
            self.reactor,
            "t1-node1",
            "node2",
            ALICE,
            serve_view=False,
            on_word=lambda line, word: self.heard_home.append(word),
            on_down=lambda line, reason: self.downs.append(f"{line.host}: {reason}"),
        )
        self.keeper = Lifeline(
            self.reactor,
            "t1-node1",
            epoch=1,
            leads=True,
            on_message=lambda data: self.heard_there.append(guestwords.decode_for_keeper(data)),
        )

    def connect(self) -> None:
        left, right = socket.socketpair()
        for end, sock in ((self.line.lifeline, left), (self.keeper, right)):
            fd = sock.detach()
            end.attach(fd, fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Reactor() as reactor:
        ends = Ends(reactor)
        yield ends
        ends.line.close()
        ends.keeper.detach()


def test_words_go_both_ways(ends: Ends) -> None:
    ends.connect()
    ends.line.send(Signal(15))
    ends.keeper.send_message(guestwords.encode(Stopped(20)))
    assert wait_until(ends.reactor, lambda: bool(ends.heard_home and ends.heard_there), LONG)
    assert ends.heard_there == [Signal(15)]
    assert ends.heard_home == [Stopped(20)]


def test_what_was_said_while_cut_off_arrives_once_and_in_order(ends: Ends) -> None:
    ends.line.send(Signal(1))
    ends.connect()
    assert wait_until(ends.reactor, lambda: len(ends.heard_there) == 1, LONG)
    ends.keeper.detach()
    assert wait_until(ends.reactor, lambda: bool(ends.downs), LONG)
    ends.line.send(Signal(2))
    ends.line.send(Kill())
    ends.keeper.send_message(guestwords.encode(Ended(-9)))
    ends.connect()
    assert wait_until(
        ends.reactor, lambda: len(ends.heard_there) >= 3 and bool(ends.heard_home), LONG
    )
    assert ends.heard_there == [Signal(1), Signal(2), Kill()]
    assert ends.heard_home == [Ended(-9)]


def test_a_cut_is_told_once_with_the_host_and_a_reason(ends: Ends) -> None:
    ends.connect()
    assert wait_until(ends.reactor, lambda: ends.line.lifeline.up, LONG)
    ends.keeper.detach()
    assert wait_until(ends.reactor, lambda: bool(ends.downs), LONG)
    assert ends.downs == ["node2: lifeline: closed by the other end"]


def test_closing_is_no_cut(ends: Ends) -> None:
    ends.connect()
    assert wait_until(ends.reactor, lambda: ends.line.lifeline.up, LONG)
    ends.line.close()
    ends.line.close()
    assert wait_until(ends.reactor, lambda: not ends.keeper.attached, LONG)
    assert ends.downs == []


def test_home_without_sftp_server_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view_server, "SFTP_SERVERS", ("/no/such/server",))
    with Reactor() as reactor, pytest.raises(HostError, match="install openssh-sftp-server"):
        HomeLine(
            reactor,
            "t1-node1",
            "node2",
            ALICE,
            serve_view=True,
            on_word=lambda line, word: None,
            on_down=lambda line, reason: None,
        )


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", guestwords.encode(Kill()), b"\x81\xa4type\xa5ended"],
    ids=["empty", "no msgpack", "a guard's word", "half a word"],
)
def test_a_keeper_that_talks_nonsense_is_hung_up_on(ends: Ends, garbage: bytes) -> None:
    ends.connect()
    ends.keeper.send_message(garbage)
    assert wait_until(ends.reactor, lambda: bool(ends.downs), 1)
