"""Frames survive any cutting of the stream, and nothing hostile is kept."""

import asyncio
import socket
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.framing import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    FrameDecoder,
    FrameError,
    FrameTooLarge,
    FrameTruncated,
    encode_frame,
    read_frame,
    recv_frame,
    send_frame,
)

payloads = st.lists(st.binary(max_size=300), max_size=8)


def test_the_length_is_four_bytes_big_endian() -> None:
    assert encode_frame(b"abc") == b"\0\0\0\x03abc"
    assert encode_frame(b"") == b"\0\0\0\0"


@given(payloads, st.data())
def test_a_stream_cut_anywhere_gives_the_same_frames(
    frames: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(encode_frame, frames))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder = FrameDecoder()
    got: list[bytes] = []
    for start, end in pairwise([0, *cuts, len(stream)]):
        got += decoder.feed(stream[start:end])
    assert got == frames
    decoder.finish()


def test_a_frame_is_given_out_as_soon_as_its_last_byte_is_there() -> None:
    decoder = FrameDecoder()
    stream = encode_frame(b"one") + encode_frame(b"two")
    assert decoder.feed(stream[:6]) == []
    assert decoder.feed(stream[6:7]) == [b"one"]
    assert decoder.feed(stream[7:]) == [b"two"]


def test_the_limit_itself_is_allowed_and_one_more_is_not() -> None:
    decoder = FrameDecoder(limit_bytes=5)
    assert decoder.feed(encode_frame(b"12345")) == [b"12345"]
    with pytest.raises(FrameTooLarge, match="6 bytes long, at most 5"):
        decoder.feed(b"\0\0\0\x06")


def test_a_huge_length_is_refused_at_its_header_and_ever_after() -> None:
    decoder = FrameDecoder()
    with pytest.raises(FrameTooLarge):
        decoder.feed(b"\xff\xff\xff\xff")
    with pytest.raises(FrameTooLarge):
        decoder.feed(encode_frame(b"good"))
    with pytest.raises(FrameTooLarge):
        decoder.finish()


def test_an_end_within_a_frame_is_an_error_and_between_frames_is_not() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(b"whole"))
    decoder.finish()
    decoder.feed(b"\0\0")
    with pytest.raises(FrameTruncated):
        decoder.finish()


@given(st.binary(max_size=64))
def test_garbage_gives_frames_or_an_error_but_nothing_else(garbage: bytes) -> None:
    decoder = FrameDecoder(limit_bytes=16)
    try:
        frames = decoder.feed(garbage)
    except FrameError:
        return
    assert sum(HEADER_BYTES + len(frame) for frame in frames) <= len(garbage)


def test_what_is_too_large_is_not_even_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(FrameTooLarge):
            send_frame(ours, b"x" * (MAX_FRAME_BYTES + 1))
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


def test_the_largest_frame_passes_a_blocking_socket() -> None:
    ours, theirs = socket.socketpair()
    payload = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    with ours, theirs:
        sender = threading.Thread(target=send_frame, args=(ours, payload))
        sender.start()
        assert recv_frame(theirs) == payload
        sender.join()


def test_receiving_takes_not_a_byte_beyond_its_frame() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_frame(b"frame") + b"the rest")
        assert recv_frame(theirs) == b"frame"
        assert theirs.recv(100) == b"the rest"


@pytest.mark.parametrize("cut", range(1, HEADER_BYTES + 4))
def test_a_blocking_socket_tells_half_a_frame_from_the_end(cut: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode_frame(b"1234")[:cut])
        ours.close()
        with pytest.raises(FrameTruncated, match=f"after {cut} bytes"):
            recv_frame(theirs)


def test_the_end_between_frames_is_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.close()
        assert recv_frame(theirs) is None


def test_a_blocking_socket_refuses_a_huge_length_without_waiting_for_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\x7f\xff\xff\xff")
        with pytest.raises(FrameTooLarge):
            recv_frame(theirs)


def stream_of(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def test_asyncio_streams_carry_the_same_frames() -> None:
    async def read() -> None:
        reader = stream_of(encode_frame(b"one") + encode_frame(b""))
        assert await read_frame(reader) == b"one"
        assert await read_frame(reader) == b""
        assert await read_frame(reader) is None
        for cut in (1, 4, 6):
            with pytest.raises(FrameTruncated, match=f"after {cut} bytes"):
                await read_frame(stream_of(encode_frame(b"1234")[:cut]))
        with pytest.raises(FrameTooLarge):
            await read_frame(stream_of(b"\xff" * 8))

    asyncio.run(read())
