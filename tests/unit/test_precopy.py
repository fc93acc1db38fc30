"""Memory that was sent ahead: the dump carries what has changed, and what comes out is what was there."""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_hooks import precopy
from criu_hooks.pages import PAGE_SIZE, PageImageWriter
from criu_hooks.precopy import KnownPages, Thinner, send_ahead

# criu/page-xfer.c: PS_IOV_*; criu/include/pagemap.h: PE_*.
OPEN2, ADD_F, CLOSE = 4, 6, 0x1023
IN_PARENT, PRESENT = 1, 4
PID = 77
TO = PID << 8 | 1


def iov(command: int, flags: int = 0, count: int = 0, address: int = 0) -> bytes:
    return struct.pack("=IIQQQ", flags << 16 | command, 0, count, address, TO)


def page(letter: bytes) -> bytes:
    return letter * PAGE_SIZE


def entries(stream: bytes) -> list[tuple[int, int, bytes]]:
    """(flags, address, letters of its pages) of each ADD_F in a stream."""
    found = []
    at = 0
    while at < len(stream):
        word, _, count, address, _ = struct.unpack_from("=IIQQQ", stream, at)
        at += 32
        if word & 0xFFFF != ADD_F:
            continue
        flags = word >> 16
        data = stream[at : at + count * PAGE_SIZE] if flags & PRESENT else b""
        at += len(data)
        found.append((flags, address, data[::PAGE_SIZE] if data else b"=" * count))
    return found


def dump(address: int, letters: bytes) -> bytes:
    pages = b"".join(page(bytes([letter])) for letter in letters)
    return iov(OPEN2) + iov(ADD_F, PRESENT, len(letters), address) + pages + iov(CLOSE)


@pytest.mark.parametrize("copies", [0, 1 << 20], ids=["digests", "copies"])
def test_only_pages_that_changed_are_sent(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precopy, "COPIES_BYTES", copies)
    known = KnownPages()
    known.add(TO, 0x10000, page(b"a") + page(b"b") + page(b"c"))
    known.add(TO, 0x20000, page(b"d"))
    stream = bytes(Thinner(known).feed(memoryview(dump(0x10000, b"aXcY"))))
    assert entries(stream) == [
        (IN_PARENT, 0x10000, b"="),
        (PRESENT, 0x10000 + PAGE_SIZE, b"X"),
        (IN_PARENT, 0x10000 + 2 * PAGE_SIZE, b"="),
        (PRESENT, 0x10000 + 3 * PAGE_SIZE, b"Y"),
    ]


@pytest.mark.parametrize("copies", [0, 1 << 20], ids=["digests", "copies"])
def test_a_page_that_changed_in_a_block_goes_alone(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precopy, "COPIES_BYTES", copies)
    known = KnownPages()
    before = bytes(range(65, 65 + 48))
    known.add(TO, 0x10000, b"".join(page(bytes([letter])) for letter in before))
    now = before[:20] + b"!" + before[21:]
    stream = bytes(Thinner(known).feed(memoryview(dump(0x10000, now))))
    assert entries(stream) == [
        (IN_PARENT, 0x10000, b"=" * 20),
        (PRESENT, 0x10000 + 20 * PAGE_SIZE, b"!"),
        (IN_PARENT, 0x10000 + 21 * PAGE_SIZE, b"=" * 27),
    ]


def test_the_same_page_at_another_address_or_of_another_process_is_sent() -> None:
    known = KnownPages()
    known.add(TO, 0x10000, page(b"a"))
    assert known.same(TO, 0x10000, page(b"a"))
    assert not known.same(TO, 0x10000 + PAGE_SIZE, page(b"a"))
    assert not known.same(TO, 0x10000 - PAGE_SIZE, page(b"a"))
    assert not known.same(TO + 256, 0x10000, page(b"a"))


def test_copies_become_digests_when_there_is_too_much_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precopy, "COPIES_BYTES", 2 * PAGE_SIZE)
    known = KnownPages()
    for number, letter in enumerate(b"abcd"):
        known.add(TO, number * PAGE_SIZE, page(bytes([letter])))
    for number, letter in enumerate(b"abcd"):
        assert known.same(TO, number * PAGE_SIZE, page(bytes([letter])))
        assert not known.same(TO, number * PAGE_SIZE, page(b"e"))


@settings(deadline=None, max_examples=80)
@given(
    st.binary(min_size=1, max_size=60),
    st.dictionaries(st.integers(0, 70), st.integers(0, 255), max_size=4),
    st.integers(1, 60),
    st.integers(0, 3),
    st.sampled_from((0, 40 * PAGE_SIZE, 1 << 20)),
    st.integers(0, 2**32),
)
def test_what_comes_out_is_the_memory_of_the_dump(
    before: bytes, changed: dict[int, int], length: int, apart: int, copies: int, seed: int
) -> None:
    """However the stream is cut: parent and pages together hold each page as it was dumped."""
    now = bytes(
        changed.get(number, before[number] if number < len(before) else 0)
        for number in range(length)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precopy, "COPIES_BYTES", copies)
        known = KnownPages()
        # As chunks: what is compared at once need not begin where they do.
        for part in (slice(0, 16 + apart), slice(16 + apart, None)):
            if letters := before[part]:
                data = b"".join(page(bytes([letter])) for letter in letters)
                known.add(TO, (part.start or 0) * PAGE_SIZE, data)
    stream, pieces = dump(0, now), random.Random(seed)
    thinner, out, at = Thinner(known), b"", 0
    while at < len(stream):
        size = pieces.choice((31, 33, 4095, 4096, 5000, 20000, 70000, 200000))
        out += bytes(thinner.feed(memoryview(stream[at : at + size])))
        at += size
    memory = {}
    for flags, address, letters in entries(out):
        for number, letter in enumerate(letters):
            first = address // PAGE_SIZE + number
            memory[first] = before[first] if flags == IN_PARENT else letter
    assert bytes(memory[number] for number in range(len(now))) == now


PROGRAM = """
import mmap, sys
block = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.write(b"sent-ahead" * 100)
shared = mmap.mmap(-1, mmap.PAGESIZE)
for at in range(len(shared)):
    shared[at] = (7 * at + 3) % 251
print(flush=True)
sys.stdin.read()
"""


def test_private_memory_of_a_process_is_read_and_no_other(tmp_path: Path) -> None:
    proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    known = KnownPages()
    with subprocess.Popen(
        [sys.executable, "-ISc", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline()
        stream = b"".join(send_ahead(proc_fd, [child.pid], known))
        child.kill()
    os.close(proc_fd)
    if not known:
        pytest.skip("the kernel lacks PAGEMAP_SCAN (Linux 6.7): nothing can be sent ahead")
    assert b"sent-ahead" * 100 in stream
    assert bytes((7 * at + 3) % 251 for at in range(PAGE_SIZE)) not in stream
    directory_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    writer = PageImageWriter(directory_fd)
    writer.write(memoryview(stream))
    os.close(directory_fd)
    assert writer.finished
    assert (tmp_path / f"pagemap-{child.pid}.img").exists()


def test_a_process_that_has_ended_is_left_out() -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        child.wait()
    proc_fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    known = KnownPages()
    stream = list(send_ahead(proc_fd, [child.pid], known))
    os.close(proc_fd)
    assert len(stream) == 1 and not known
