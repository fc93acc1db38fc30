"""The page stream of a dump: criu's questions are answered, and images come out at the other end."""

import itertools
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_hooks import pages
from criu_hooks.pages import PAGE_SIZE, PageImageWriter, PageSource, PageStreamError

# criu/page-xfer.c: PS_IOV_*, PS_TYPE_*; criu/include/pagemap.h: PE_*.
ADD, HOLE, OPEN, OPEN2, PARENT, ADD_F, GET, CLOSE, FORCE_CLOSE = 1, 2, 3, 4, 5, 6, 7, 0x1023, 0x1024
IN_PARENT, LAZY, PRESENT = 1, 2, 4
PID, SHMEM = 1, 2
MAGICS = struct.pack("=II", 0x54564319, 0x56084025)


def iov(command: int, flags: int = 0, count: int = 0, address: int = 0, to: int = 0) -> bytes:
    """struct page_server_iov as criu sends it on a 64-bit machine."""
    return struct.pack("=IIQQQ", flags << 16 | command, 0, count, address, to)


def destination(number: int, kind: int = PID) -> int:
    return number << 8 | kind


def page(text: bytes) -> bytes:
    return text.ljust(PAGE_SIZE, b".")


@dataclass(frozen=True)
class Entry:
    """One pagemap_entry (images/pagemap.proto)."""

    address: int
    count: int
    flags: int


def read_fields(data: bytes) -> Iterator[tuple[int, int]]:
    """The varint fields of a protobuf message."""
    numbers = []
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    assert shift == 0 and len(numbers) % 2 == 0
    for key, number in zip(numbers[::2], numbers[1::2], strict=True):
        assert key & 7 == 0  # a varint
        yield key >> 3, number


def read_pagemap(path: Path) -> tuple[int, list[Entry]]:
    """The number of the pages file, and the entries."""
    data = path.read_bytes()
    assert data[:8] == MAGICS
    messages, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from("=I", data, at)
        messages.append(dict(read_fields(data[at + 4 : at + 4 + size])))
        at += 4 + size
    assert at == len(data)
    head, *entries = messages
    for entry in entries:
        assert entry[2] == entry[5] & 0xFFFFFFFF
    return head[1], [Entry(entry[1], entry[5], entry.get(4, 0)) for entry in entries]


TREE = b"".join(
    [
        iov(OPEN2, to=destination(6699)),
        iov(ADD_F, PRESENT, 2, 0x7F0000001000, destination(6699)),
        page(b"first") + page(b"second"),
        iov(ADD_F, LAZY, 300, 0x7F0000100000, destination(6699)),
        iov(ADD_F, PRESENT | LAZY, 1, 0xFFFFFFFFFF600000, destination(6699)),
        page(b"third"),
        iov(OPEN2, to=destination(6700)),
        iov(OPEN2, to=destination(0xFFFFFFFF, SHMEM)),
        iov(ADD_F, PRESENT, 1, 0, destination(0xFFFFFFFF, SHMEM)),
        page(b"shared"),
        iov(CLOSE),
    ]
)
TREE_FILES = {
    "pagemap-6699.img",
    "pagemap-6700.img",
    "pagemap-shmem-4294967295.img",
    "pages-1.img",
    "pages-2.img",
    "pages-3.img",
}


def write_in_pieces(directory: Path, pieces: list[bytes]) -> PageImageWriter:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    writer = PageImageWriter(fd)
    try:
        for piece in pieces:
            writer.write(memoryview(piece))
    finally:
        writer.close()
        os.close(fd)
    return writer


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_images_are_those_that_criu_restores_from(tmp_path: Path) -> None:
    writer = write_in_pieces(tmp_path, [TREE])
    assert set(contents(tmp_path)) == TREE_FILES
    assert read_pagemap(tmp_path / "pagemap-6699.img") == (
        1,
        [
            Entry(0x7F0000001000, 2, PRESENT),
            Entry(0x7F0000100000, 300, LAZY),
            Entry(0xFFFFFFFFFF600000, 1, PRESENT | LAZY),
        ],
    )
    assert read_pagemap(tmp_path / "pagemap-6700.img") == (2, [])
    assert read_pagemap(tmp_path / "pagemap-shmem-4294967295.img") == (3, [Entry(0, 1, PRESENT)])
    assert (tmp_path / "pages-1.img").read_bytes() == page(b"first") + page(b"second") + page(
        b"third"
    )
    assert (tmp_path / "pages-2.img").read_bytes() == b""
    assert (tmp_path / "pages-3.img").read_bytes() == page(b"shared")
    assert writer.finished
    assert writer.page_bytes == 4 * PAGE_SIZE


def test_images_are_for_their_owner_only(tmp_path: Path) -> None:
    write_in_pieces(tmp_path, [TREE])
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(0, len(TREE)), max_size=40))
def test_how_the_stream_was_cut_into_pieces_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), len(TREE)]
    pieces = [TREE[a:b] for a, b in itertools.pairwise(edges)]
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    write_in_pieces(whole, [TREE])
    assert write_in_pieces(cut, pieces).finished
    assert contents(cut) == contents(whole)
    source = PageSource()
    assert b"".join(source.answers(memoryview(piece)) for piece in pieces) == b"\0" * 7
    assert (source.finished, source.page_bytes) == (True, 4 * PAGE_SIZE)


@pytest.mark.parametrize("step", [1, 31, 32, 33])
def test_headers_may_come_in_pieces_of_any_size(tmp_path: Path, step: int) -> None:
    pieces = [TREE[at : at + step] for at in range(0, len(TREE), step)]
    writer = write_in_pieces(tmp_path, pieces)
    assert writer.finished
    assert (tmp_path / "pages-3.img").read_bytes() == page(b"shared")


@settings(deadline=None, max_examples=40)
@given(end=st.integers(0, len(TREE) - 1))
def test_a_stream_that_breaks_off_is_never_taken_for_complete(
    tmp_path_factory: pytest.TempPathFactory, end: int
) -> None:
    directory = tmp_path_factory.mktemp("images")
    writer = write_in_pieces(directory, [TREE[:end]])
    source = PageSource()
    source.answers(memoryview(TREE[:end]))
    assert not writer.finished
    assert not source.finished
    assert set(contents(directory)) <= TREE_FILES


@settings(deadline=None)
@given(data=st.binary(max_size=300), start=st.sampled_from([0, 32, 64, len(TREE)]))
def test_garbage_is_refused_or_waits_for_more_and_makes_no_other_files(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int
) -> None:
    directory = tmp_path_factory.mktemp("images")
    try:
        write_in_pieces(directory, [TREE[:start] + data])
    except PageStreamError as error:
        assert "\n" not in str(error)
    assert all(name.startswith(("pages-", "pagemap-")) for name in contents(directory))


@pytest.mark.parametrize("command", [0, ADD, HOLE, OPEN, GET, 8, 0x1022, 0x1025, 0xFFFF])
def test_unknown_commands_are_refused_by_both_sides(tmp_path: Path, command: int) -> None:
    with pytest.raises(PageStreamError, match=f"unknown page server command {command:#x}"):
        write_in_pieces(tmp_path, [iov(command, to=destination(5))])
    with pytest.raises(PageStreamError, match="unknown page server command"):
        PageSource().answers(memoryview(iov(command)))


@pytest.mark.parametrize("flags", [8, PRESENT | 8, 0x8000, 0xFFFF])
def test_unknown_flags_are_refused(tmp_path: Path, flags: int) -> None:
    stream = iov(OPEN2, to=destination(5)) + iov(ADD_F, flags, 1, 0x1000, destination(5))
    with pytest.raises(PageStreamError, match="unknown page flags"):
        write_in_pieces(tmp_path, [stream])


@pytest.mark.parametrize("count", [0, 1 << 40, (1 << 64) - 1])
def test_no_pages_and_more_pages_than_any_memory_has_are_refused(
    tmp_path: Path, count: int
) -> None:
    stream = iov(OPEN2, to=destination(5)) + iov(ADD_F, PRESENT, count, 0, destination(5))
    with pytest.raises(PageStreamError):
        write_in_pieces(tmp_path, [stream])


@pytest.mark.parametrize(
    ("address", "count"),
    [(1, 1), (PAGE_SIZE // 2, 1), ((1 << 64) - PAGE_SIZE, 2)],
)
def test_pages_lie_where_memory_can_be(tmp_path: Path, address: int, count: int) -> None:
    stream = iov(OPEN2, to=destination(5)) + iov(ADD_F, PRESENT, count, address, destination(5))
    with pytest.raises(PageStreamError, match=f"no pages can be at {address:#x}"):
        write_in_pieces(tmp_path, [stream])


def test_what_is_said_of_pages_without_sending_them_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "MAX_PAGEMAP_BYTES", 1000)
    empty = iov(ADD_F, IN_PARENT, 1, 0x1000, destination(5))
    (tmp_path / "few").mkdir()
    write_in_pieces(tmp_path / "few", [iov(OPEN2, to=destination(5)) + empty * 10 + iov(CLOSE)])
    with pytest.raises(PageStreamError, match="too large"):
        write_in_pieces(tmp_path, [iov(OPEN2, to=destination(5)) + empty * 1000])


@pytest.mark.parametrize(
    "to", [0, destination(5, 0), destination(5, 3), destination(5, 11), destination(1 << 32)]
)
def test_unknown_destinations_are_refused(tmp_path: Path, to: int) -> None:
    with pytest.raises(PageStreamError, match="unknown page destination"):
        write_in_pieces(tmp_path, [iov(OPEN2, to=to)])
    assert contents(tmp_path) == {}


def test_an_image_comes_once(tmp_path: Path) -> None:
    first = iov(OPEN2, to=destination(5)) + iov(ADD_F, PRESENT, 1, 0, destination(5)) + page(b"x")
    with pytest.raises(PageStreamError, match=r"pagemap-5\.img comes twice"):
        write_in_pieces(tmp_path, [first + iov(OPEN2, to=destination(5))])
    assert (tmp_path / "pages-1.img").read_bytes() == page(b"x")


def test_a_pid_and_a_shared_memory_may_have_the_same_number(tmp_path: Path) -> None:
    stream = iov(OPEN2, to=destination(5)) + iov(OPEN2, to=destination(5, SHMEM)) + iov(CLOSE)
    write_in_pieces(tmp_path, [stream])
    assert {"pagemap-5.img", "pagemap-shmem-5.img"} <= set(contents(tmp_path))


@pytest.mark.parametrize(
    "before",
    [
        b"",
        iov(OPEN2, to=destination(6)),
        iov(OPEN2, to=destination(5)) + iov(OPEN2, to=destination(6)),
        iov(OPEN2, to=destination(5, SHMEM)),
    ],
)
def test_pages_go_only_into_the_image_that_is_open(tmp_path: Path, before: bytes) -> None:
    stream = before + iov(ADD_F, PRESENT, 1, 0, destination(5)) + page(b"x")
    with pytest.raises(PageStreamError, match="not open"):
        write_in_pieces(tmp_path, [stream])


@pytest.mark.parametrize("more", [iov(OPEN2, to=destination(9)), iov(CLOSE), iov(PARENT)])
@pytest.mark.parametrize("end", [CLOSE, FORCE_CLOSE])
def test_nothing_comes_after_the_end(tmp_path: Path, end: int, more: bytes) -> None:
    with pytest.raises(PageStreamError, match="after the end"):
        write_in_pieces(tmp_path, [iov(end), more])


def test_the_number_of_images_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_IMAGES", 3)
    opens = [iov(OPEN2, to=destination(number)) for number in range(1, 5)]
    write_in_pieces(tmp_path, opens[:3])
    with pytest.raises(PageStreamError):
        (tmp_path / "more").mkdir()
        write_in_pieces(tmp_path / "more", opens)


@pytest.mark.parametrize("name", ["pages-1.img", "pagemap-5.img"])
def test_what_stands_in_the_way_is_neither_followed_nor_overwritten(
    tmp_path: Path, name: str
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep")
    images = tmp_path / "images"
    images.mkdir()
    (images / name).symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_in_pieces(images, [iov(OPEN2, to=destination(5)) + iov(CLOSE)])
    assert precious.read_text() == "keep"


def test_criu_is_told_that_there_is_no_parent_image_and_that_its_end_was_heard() -> None:
    source = PageSource()
    assert source.answers(memoryview(iov(OPEN2, to=destination(5)))) == b"\0"
    assert source.answers(memoryview(iov(PARENT, to=destination(5)))) == struct.pack("=i", 0)
    assert source.answers(memoryview(iov(ADD_F, PRESENT, 1, 0, destination(5)))) == b""
    assert source.answers(memoryview(page(iov(CLOSE)))) == b""
    assert not source.finished
    assert source.answers(memoryview(iov(FORCE_CLOSE))) == struct.pack("=i", 0)
    assert source.finished


def test_memory_that_looks_like_headers_is_memory(tmp_path: Path) -> None:
    memory = (iov(CLOSE) * (PAGE_SIZE // 32)) + random.Random(7).randbytes(PAGE_SIZE)
    stream = iov(OPEN2, to=destination(5)) + iov(ADD_F, PRESENT, 2, 0, destination(5)) + memory
    writer = write_in_pieces(tmp_path, [stream, iov(CLOSE)])
    assert (tmp_path / "pages-1.img").read_bytes() == memory
    assert writer.finished


def test_a_count_beyond_32_bits_keeps_its_low_half_for_older_readers(tmp_path: Path) -> None:
    stream = iov(OPEN2, to=destination(5)) + iov(ADD_F, LAZY, (1 << 33) + 7, 0, destination(5))
    write_in_pieces(tmp_path, [stream + iov(CLOSE)])
    assert read_pagemap(tmp_path / "pagemap-5.img")[1] == [Entry(0, (1 << 33) + 7, LAZY)]


def test_pycriu_reads_the_images_as_we_do(tmp_path: Path) -> None:
    pytest.importorskip("pycriu")
    from pycriu import images

    write_in_pieces(tmp_path, [TREE])
    with (tmp_path / "pagemap-6699.img").open("rb") as file:
        entries = images.load(file, pretty=False)["entries"]
    assert entries[0] == {"pages_id": 1}
    assert [int(str(entry["vaddr"]), 0) for entry in entries[1:]] == [
        0x7F0000001000,
        0x7F0000100000,
        0xFFFFFFFFFF600000,
    ]
    assert [entry["nr_pages"] for entry in entries[1:]] == [2, 300, 1]
