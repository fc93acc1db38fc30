"""What clients and migd say to each other: typed, bounded, and whatever else comes is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import messages
from migrate.messages import (
    Checked,
    Guests,
    ListGuests,
    Move,
    Moved,
    Obstacle,
    Progress,
    Recover,
    Recovered,
    Refused,
    decode_reply,
    decode_request,
    encode,
)

REQUESTS: list[messages.Request] = [
    Move(6699),
    Move(0x7FFFFFFF, "node3", 3, True),
    ListGuests(),
    Recover(),
    Recover("node2"),
]
REPLIES = [
    Progress("dumped", 1 << 33, 12.5),
    Moved(6699, "node3", 48.2, 212 << 20, ("a note",)),
    Checked(6699),
    Refused((Obstacle("fd 3", "is a lock"), Obstacle("fd 4", "is odd", "close it"))),
    Guests((messages.GuestRow(6699, "alice", "node1", "node2", 1.5, "RESUMED", "sleep"),)),
    Recovered(("t1: ended",)),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_arrive_as_they_were(request_: messages.Request) -> None:
    assert decode_request(encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES)
def test_replies_arrive_as_they_were(reply: messages.Reply) -> None:
    assert decode_reply(encode(reply)) == reply


@pytest.mark.parametrize("reply", REPLIES)
def test_only_progress_is_not_the_last_reply(reply: messages.Reply) -> None:
    assert isinstance(reply, messages.FINAL) == (not isinstance(reply, Progress))


def test_a_request_says_of_which_version_it_is() -> None:
    older = {"type": "move", "pid": 5, "protocol": messages.PROTOCOL - 1}
    decoded = decode_request(encode(older))
    assert decoded.protocol != messages.PROTOCOL
    assert all(request.protocol == messages.PROTOCOL for request in REQUESTS)


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_is_no_request(reply: messages.Reply) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_request(encode(reply))


@pytest.mark.parametrize(
    "document",
    [
        {"type": "move"},
        {"type": "move", "pid": 0},
        {"type": "move", "pid": -1},
        {"type": "move", "pid": 1 << 31},
        {"type": "move", "pid": 1 << 63},
        {"type": "move", "pid": "6699"},
        {"type": "move", "pid": 66.99},
        {"type": "move", "pid": True},
        {"type": "move", "pid": None},
        {"type": "move", "pid": 5, "host": "x" * 257},
        {"type": "move", "pid": 5, "host": ["node2"]},
        {"type": "move", "pid": 5, "check_only": 1},
        {"type": "recover", "lost_host": "x" * 257},
        {"type": "exec", "pid": 5},
        {"pid": 5},
        {},
        [],
        "move",
        None,
    ],
    ids=str,
)
def test_wrong_requests_are_refused(document: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_request(encode(document))


@given(st.binary(max_size=80))
def test_garbage_is_no_message(data: bytes) -> None:
    # msgspec lets the error of a text that is not UTF-8 through as it is.
    for decode in (decode_request, decode_reply):
        with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
            decode(data)


@given(st.sampled_from(REQUESTS), st.data())
def test_half_a_message_is_no_message(request_: messages.Request, data: st.DataObject) -> None:
    whole = encode(request_)
    end = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(msgspec.MsgspecError):
        decode_request(whole[:end])
    with pytest.raises(msgspec.MsgspecError):
        decode_request(whole + b"\0")
