"""Images that would give their process more rights than its user has are refused."""

import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pycriu", reason="pycriu comes with Debian's python3-pycriu")

from pycriu.images import core_pb2

from criu_hooks.images import ImageError, check_rights

COMMON, CORE = 0x54564319, 0x55053847
UID, GIDS = 1001, frozenset({1001, 100})


def core(change: Callable[[Any], None] = lambda core: None) -> bytes:
    """One thread of alice, as CRIU dumps it, with a change."""
    entry = core_pb2.core_entry()
    entry.mtype = core_pb2.core_entry.X86_64
    thread = entry.thread_core
    thread.futex_rla = thread.futex_rla_len = 0
    thread.sched_nice = thread.sched_policy = 0
    creds = thread.creds
    creds.uid = creds.euid = creds.suid = creds.fsuid = 1001
    creds.gid = creds.egid = creds.sgid = creds.fsgid = 1001
    creds.groups.extend([100, 1001])
    for words in (creds.cap_inh, creds.cap_prm, creds.cap_eff):
        words.extend([0, 0])
    creds.cap_bnd.extend([0xFFFFFFFF, 0x1FF])
    creds.secbits = 0
    change(entry)
    return bytes(entry.SerializePartialToString())


def image(messages: Iterable[bytes], magics: bytes = struct.pack("=II", COMMON, CORE)) -> bytes:
    return magics + b"".join(struct.pack("=I", len(text)) + text for text in messages)


def zombie(entry: Any) -> None:
    """CRIU's image of a child that has ended and is not waited for yet."""
    entry.ClearField("thread_core")
    entry.tc.task_state = 2
    entry.tc.exit_code = 0


def check(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        check_rights(fd, UID, GIDS)
    finally:
        os.close(fd)


def test_a_users_own_rights_pass(tmp_path: Path) -> None:
    (tmp_path / "core-6699.img").write_bytes(image([core()]))
    (tmp_path / "core-6700.img").write_bytes(image([core()]))
    (tmp_path / "pages-1.img").write_bytes(b"anything")
    check(tmp_path)


def set_creds(name: str, value: int) -> Callable[[Any], None]:
    return lambda entry: setattr(entry.thread_core.creds, name, value)


def add_creds(name: str, *values: int) -> Callable[[Any], None]:
    return lambda entry: getattr(entry.thread_core.creds, name).extend(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *[
            (set_creds(name, value), "another user")
            for name in ("uid", "euid", "suid", "fsuid")
            for value in (0, 1002)
        ],
        *[
            (set_creds(name, value), "in a group")
            for name in ("gid", "egid", "sgid", "fsgid")
            for value in (0, 27)
        ],
        (add_creds("groups", 0), "in a group"),
        *[
            (add_creds(name, 0, 1), "capabilities")
            for name in ("cap_inh", "cap_prm", "cap_eff", "cap_amb")
        ],
        (set_creds("secbits", 1), "securebits"),
        (lambda entry: entry.thread_core.ClearField("creds"), "no owner"),
        (lambda entry: entry.ClearField("thread_core"), "no owner"),
    ],
)
def test_each_right_too_many_is_refused(
    tmp_path: Path, change: Callable[[Any], None], reason: str
) -> None:
    (tmp_path / "core-1.img").write_bytes(image([core()]))
    (tmp_path / "core-2.img").write_bytes(image([core(change)]))
    with pytest.raises(ImageError, match=rf"core-2\.img.*{reason}|core-2\.img cannot be read"):
        check(tmp_path)


def test_every_message_of_an_image_is_looked_at(tmp_path: Path) -> None:
    root = core(set_creds("euid", 0))
    (tmp_path / "core-1.img").write_bytes(image([core(), root]))
    with pytest.raises(ImageError, match="another user"):
        check(tmp_path)


def test_images_without_a_process_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pages-1.img").write_bytes(b"")
    with pytest.raises(ImageError, match="no process"):
        check(tmp_path)


@pytest.mark.parametrize(
    "magics",
    [
        struct.pack("=II", CORE, len(core())),  # read by CRIU's version 1 four bytes earlier
        struct.pack("=II", CORE, COMMON),
        struct.pack("=II", COMMON, 0x56084025),
        struct.pack("=II", 0x55105940, CORE),  # a service file
        struct.pack("=I", COMMON),
        b"",
    ],
)
def test_an_image_that_criu_would_read_otherwise_is_refused(tmp_path: Path, magics: bytes) -> None:
    (tmp_path / "core-1.img").write_bytes(image([core()], magics))
    with pytest.raises(ImageError, match="no image of a process"):
        check(tmp_path)


@pytest.mark.parametrize("kept", [9, 11, 13, 60, -1])
def test_an_image_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "core-1.img").write_bytes(image([core()])[:kept])
    with pytest.raises(ImageError, match="cut off"):
        check(tmp_path)


def test_a_length_beyond_reason_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_bytes(struct.pack("=III", COMMON, CORE, 0xFFFFFFFF))
    with pytest.raises(ImageError, match="too large"):
        check(tmp_path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_bytes(image([b"\xff" * 40]))
    with pytest.raises(ImageError, match="cannot be read"):
        check(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(image([core()]))
    (tmp_path / "core-1.img").symlink_to("elsewhere")
    with pytest.raises(OSError):
        check(tmp_path)


def test_a_zombie_needs_no_owner(tmp_path: Path) -> None:
    (tmp_path / "core-7.img").write_bytes(image([core()]))
    (tmp_path / "core-8.img").write_bytes(image([core(zombie)]))
    check(tmp_path)
