"""The size of an open file at home may change while its guest stands still; of a mapped one it may not."""

import os
import struct
from pathlib import Path

import pytest

pytest.importorskip("pycriu", reason="pycriu comes with Debian's python3-pycriu")

from pycriu.images import fdinfo_pb2, mm_pb2

from criu_hooks.image_files import forget_sizes
from criu_hooks.images import ImageError

FILES = struct.pack("=II", 0x54564319, 0x56303138)
MM = struct.pack("=II", 0x54564319, 0x57492820)
SIZE = 4711


def file_entry(number: int, name: str) -> bytes:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=number)
    entry.reg.id, entry.reg.name, entry.reg.size = number, name, SIZE
    return bytes(entry.SerializePartialToString())


def image(head: bytes, *messages: bytes) -> bytes:
    return head + b"".join(struct.pack("=I", len(text)) + text for text in messages)


def sizes_after(directory: Path) -> dict[str, int | None]:
    """Each file's name in the images, with the size that is left."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        forget_sizes(fd, ("/home", "/srv/data"))
    finally:
        os.close(fd)
    data = (directory / "files.img").read_bytes()
    assert data[:8] == FILES
    found = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from("=I", data, at)
        entry = fdinfo_pb2.file_entry.FromString(data[at + 4 : at + 4 + size])
        found[entry.reg.name] = entry.reg.size if entry.reg.HasField("size") else None
        at += 4 + size
    return found


def test_open_files_of_the_view_lose_their_size_mapped_ones_and_others_keep_it(
    tmp_path: Path,
) -> None:
    names = ["/home/log", "/home/mapped", "/home/program", "/usr/lib/x", "/srv/data/a", "/srv/b"]
    entries = [file_entry(number, name) for number, name in enumerate(names, 1)]
    (tmp_path / "files.img").write_bytes(image(FILES, *entries))
    mm = mm_pb2.mm_entry(exe_file_id=3)
    mm.vmas.add(shmid=2)
    (tmp_path / "mm-7.img").write_bytes(image(MM, mm.SerializePartialToString()))
    assert sizes_after(tmp_path) == {
        "/home/log": None,
        "/home/mapped": SIZE,
        "/home/program": SIZE,
        "/usr/lib/x": SIZE,
        "/srv/data/a": None,
        "/srv/b": SIZE,
    }


@pytest.mark.parametrize("left", [3, 9, 14])
def test_an_image_that_is_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    (tmp_path / "files.img").write_bytes(image(FILES, file_entry(1, "/home/log"))[:left])
    with pytest.raises(ImageError):
        sizes_after(tmp_path)
