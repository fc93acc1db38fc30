"""The size of an open file at home may change while its guest stands still; of a mapped one it may not."""

import os
import struct
from pathlib import Path

import pytest
from criu_images import PID, image, memory, regular, vma, write

from criu_hooks import image_kinds as kinds
from criu_hooks.image_files import forget_sizes
from criu_hooks.image_format import ImageError
from criu_hooks.image_memory import read_memory

SIZE = 4711
FILE_PRIVATE = 1 << 6


def sizes_after(directory: Path, mapped: frozenset[int] = frozenset()) -> dict[str, int | None]:
    """Each file's name in the images, with the size that is left."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        forget_sizes(fd, ("/home", "/srv/data"), mapped)
    finally:
        os.close(fd)
    data = (directory / "files.img").read_bytes()
    assert data[:8] == image("files.img")
    found = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack_from("=I", data, at)
        entry = kinds.FILE.read(data[at + 4 : at + 4 + size])
        file = kinds.REG.read(entry.blobs["reg"])
        found[file.path("name")] = file.numbers.get("size")
        at += 4 + size
    return found


def test_open_files_of_the_view_lose_their_size_mapped_ones_and_others_keep_it(
    tmp_path: Path,
) -> None:
    names = ["/home/log", "/home/mapped", "/home/program", "/usr/lib/x", "/srv/data/a", "/srv/b"]
    entries = [regular(number, name, size=SIZE) for number, name in enumerate(names, 1)]
    write(tmp_path, "files.img", *entries)
    assert sizes_after(tmp_path, frozenset({2, 3})) == {
        "/home/log": None,
        "/home/mapped": SIZE,
        "/home/program": SIZE,
        "/usr/lib/x": SIZE,
        "/srv/data/a": None,
        "/srv/b": SIZE,
    }


def test_program_and_mappings_are_found(tmp_path: Path) -> None:
    anonymous = vma(9, 1 << 9)
    write(tmp_path, f"mm-{PID}.img", memory(3, vma(2, FILE_PRIVATE), anonymous))
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = read_memory(fd, f"mm-{PID}.img")
    finally:
        os.close(fd)
    assert (found.program, found.accesses) == (3, {2: os.R_OK})


@pytest.mark.parametrize("left", [3, 9, 14])
def test_an_image_that_is_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    contents = image("files.img", regular(1, "/home/log", size=SIZE))
    (tmp_path / "files.img").write_bytes(contents[:left])
    with pytest.raises(ImageError):
        sizes_after(tmp_path)
