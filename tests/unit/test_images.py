"""Images that would give their process more rights than its user has are refused."""

import os
import struct
from pathlib import Path

import pytest
from criu_images import (
    COMMON,
    GID,
    GROUP,
    MAGICS,
    UID,
    core,
    creds,
    encode,
    image,
    task_core,
    thread_core,
    write,
)

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import ImageError
from criu_hooks.images import Owner, check_task
from criu_hooks.protobuf_wire import Fields

CORE = MAGICS["core"]
OWNER = Owner(UID, frozenset({GID, GROUP}))


def check(directory: Path, owner: Owner = OWNER) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        check_task(fd, "core-1.img", owner)
    finally:
        os.close(fd)


def task_after(directory: Path, owner: Owner = OWNER) -> Fields:
    """What CRIU will read of the task."""
    check(directory, owner)
    data = (directory / "core-1.img").read_bytes()
    (size,) = struct.unpack_from("=I", data, 8)
    assert len(data) == 12 + size
    return kinds.TASK_CORE.read(kinds.CORE.read(data[12:]).blobs["tc"])


def test_a_users_own_rights_pass_and_are_left_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, "core-1.img", core())
    before = (tmp_path / "core-1.img").read_bytes()
    check(tmp_path)
    assert (tmp_path / "core-1.img").read_bytes() == before


REFUSED = [
    *[
        (creds(**{name: value}), "another user")
        for name in ("uid", "euid", "suid", "fsuid")
        for value in (0, 1002, None)
    ],
    *[
        (creds(**{name: value}), "in a group")
        for name in ("gid", "egid", "sgid", "fsgid")
        for value in (0, 27, None)
    ],
    (creds(groups=[GROUP, 0]), "in a group"),
    *[
        (creds(**{name: [0, 1]}), "capabilities")
        for name in ("cap_inh", "cap_prm", "cap_eff", "cap_amb")
    ],
    (creds(secbits=1), "securebits"),
    (creds(lsm_profile="unconfined"), "security label"),
    (creds(lsm_sockcreate="unconfined"), "security label"),
    (creds(apparmor_data=b"x"), "security label"),
    (None, "no owner"),
]


@pytest.mark.parametrize(("rights", "reason"), REFUSED)
def test_each_right_too_many_is_refused(tmp_path: Path, rights: bytes | None, reason: str) -> None:
    write(tmp_path, "core-1.img", core(thread_core=thread_core(creds=rights)))
    with pytest.raises(ImageError, match=rf"core-1\.img .*{reason}"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("thread", "reason"),
    [
        ({"sched_policy": 1, "sched_prio": 50}, "realtime"),
        ({"sched_policy": 2}, "realtime"),
        ({"sched_policy": 6}, "realtime"),
        ({"seccomp_mode": 2}, "seccomp"),
    ],
)
def test_a_thread_that_would_go_before_others_is_refused(
    tmp_path: Path, thread: dict[str, int], reason: str
) -> None:
    write(tmp_path, "core-1.img", core(thread_core=thread_core(**thread)))
    with pytest.raises(ImageError, match=reason):
        check(tmp_path)


def test_a_higher_priority_than_the_ordinary_is_taken_away(tmp_path: Path) -> None:
    minus_ten = 19  # zigzag
    write(tmp_path, "core-1.img", core(thread_core=thread_core(sched_nice=minus_ten)))
    check(tmp_path)
    assert (tmp_path / "core-1.img").read_bytes() == image(
        "core-1.img", core(thread_core=thread_core(sched_nice=0))
    )


def test_a_low_priority_stays(tmp_path: Path) -> None:
    ten = core(thread_core=thread_core(sched_nice=20, sched_policy=3))
    write(tmp_path, "core-1.img", ten)
    check(tmp_path)
    assert (tmp_path / "core-1.img").read_bytes() == image("core-1.img", ten)


@pytest.mark.parametrize(
    ("said", "host", "left"),
    [(-1000, 0, 0), (-1000, -500, -500), (-300, -500, -300), (200, 0, 200)],
)
def test_protection_from_the_oom_killer_is_at_most_the_hosts(
    tmp_path: Path, said: int, host: int, left: int
) -> None:
    write(tmp_path, "core-1.img", core(tc=task_core(oom_score_adj=said)))
    task = task_after(tmp_path, Owner(UID, OWNER.gids, host))
    assert task.number("oom_score_adj") == left & (1 << 64) - 1


@pytest.mark.parametrize(("said", "left"), [(0, None), (1002, None), (UID, UID)])
def test_nobody_is_audited_as_another(tmp_path: Path, said: int, left: int | None) -> None:
    write(tmp_path, "core-1.img", core(tc=task_core(loginuid=said)))
    assert task_after(tmp_path).numbers.get("loginuid") == left


def test_limits_of_priorities_are_the_ordinary_and_others_stay(tmp_path: Path) -> None:
    some = [encode(kinds.RLIMIT, cur=40 + n, max=60 + n) for n in range(16)]
    write(tmp_path, "core-1.img", core(tc=task_core(rlimits=encode(kinds.RLIMITS, rlimits=some))))
    limits = kinds.RLIMITS.read(task_after(tmp_path).blobs["rlimits"]).blob_lists["rlimits"]
    assert [n for n in range(16) if limits[n] != some[n]] == [13, 14]
    assert limits[13] == encode(kinds.RLIMIT, cur=20, max=20)
    assert limits[14] == encode(kinds.RLIMIT, cur=0, max=0)


def test_every_message_of_an_image_is_looked_at(tmp_path: Path) -> None:
    root = core(thread_core=thread_core(creds=creds(euid=0)))
    write(tmp_path, "core-1.img", core(), root)
    with pytest.raises(ImageError, match="another user"):
        check(tmp_path)


@pytest.mark.parametrize(
    "magics",
    [
        struct.pack("=II", CORE, len(core())),  # read by CRIU's version 1 four bytes earlier
        struct.pack("=II", CORE, COMMON),
        struct.pack("=II", 0x55105940, CORE),  # a service file
        struct.pack("=I", COMMON),
        b"",
    ],
)
def test_an_image_that_criu_would_read_otherwise_is_refused(tmp_path: Path, magics: bytes) -> None:
    text = image("core-1.img", core())[8:] if len(magics) == 8 else b""
    (tmp_path / "core-1.img").write_bytes(magics + text)
    with pytest.raises(ImageError, match="no image of CRIU's"):
        check(tmp_path)


@pytest.mark.parametrize("kept", [8, 9, 11, 13, 60, -1])
def test_an_image_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    (tmp_path / "core-1.img").write_bytes(image("core-1.img", core())[:kept])
    with pytest.raises(ImageError, match="cut off"):
        check(tmp_path)


def test_a_length_beyond_reason_is_refused(tmp_path: Path) -> None:
    (tmp_path / "core-1.img").write_bytes(struct.pack("=III", COMMON, CORE, 0xFFFFFFFF))
    with pytest.raises(ImageError, match="too large"):
        check(tmp_path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "core-1.img", b"\xff" * 40)
    with pytest.raises(ImageError):
        check(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere", core())
    (tmp_path / "core-1.img").symlink_to("elsewhere")
    with pytest.raises(OSError):
        check(tmp_path)


def test_a_zombie_needs_no_owner(tmp_path: Path) -> None:
    zombie = core(thread_core=None, tc=task_core(task_state=2))
    write(tmp_path, "core-1.img", zombie)
    check(tmp_path)


def test_who_only_says_to_be_a_zombie_needs_one(tmp_path: Path) -> None:
    root = thread_core(creds=creds(uid=0, euid=0, suid=0, fsuid=0))
    write(tmp_path, "core-1.img", core(thread_core=root, tc=task_core(task_state=2)))
    with pytest.raises(ImageError, match="another user"):
        check(tmp_path)
