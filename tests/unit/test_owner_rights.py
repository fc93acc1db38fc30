"""The kernel says what the owner may do; asked here of real files, as another user."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helper_processes import HELPER_UID

from criu_hooks.image_format import ImageError
from criu_hooks.image_names import Wanted
from criu_hooks.images import Owner
from criu_hooks.mounts import Mount, MountTable
from criu_hooks.owner_rights import check_wanted

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root can ask as another user")

OWNER = Owner(HELPER_UID, frozenset({HELPER_UID}))
R, W = os.R_OK, os.W_OK


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory that everybody can reach."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)
    yield tmp_path


def check(wanted: Wanted, mounts: tuple[Mount, ...] = (), view_device: int = 0) -> None:
    root = Mount(1, 1, "/", "ext4")
    ids = os.getresuid(), os.getresgid(), os.getgroups()
    try:
        check_wanted([wanted], OWNER, HELPER_UID, MountTable((root, *mounts)), view_device)
    finally:
        assert (os.getresuid(), os.getresgid(), os.getgroups()) == ids


def make(path: Path, uid: int, mode: int) -> str:
    path.write_text("")
    os.chown(path, uid, uid)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("uid", "mode", "access", "may"),
    [
        (0, 0o640, R, False),
        (0, 0o644, R, True),
        (0, 0o644, R | W, False),
        (0, 0o640, 0, True),
        (HELPER_UID, 0o400, R, True),
        (HELPER_UID, 0o400, W, False),
    ],
)
def test_opening(place: Path, uid: int, mode: int, access: int, may: bool) -> None:
    wanted = Wanted(make(place / "file", uid, mode), access)
    if may:
        check(wanted)
    else:
        with pytest.raises(ImageError, match=r"their owner may not .* here"):
            check(wanted)


def test_what_is_below_a_closed_directory_cannot_be_had(place: Path) -> None:
    (place / "closed").mkdir(mode=0o700)
    path = make(place / "closed" / "file", HELPER_UID, 0o644)
    with pytest.raises(ImageError, match="may not read"):
        check(Wanted(path, R))


def test_making_files_in_her_own_directory(place: Path) -> None:
    os.chown(place, HELPER_UID, HELPER_UID)
    check(Wanted(f"{place}/new", makes=True))
    check(Wanted(make(place / "old", HELPER_UID, 0o600), makes=True))


def test_making_files_in_anothers_directory(place: Path) -> None:
    with pytest.raises(ImageError, match="may not make files"):
        check(Wanted(f"{place}/new", makes=True))


def test_nobody_elses_file_is_replaced_where_all_may_make_files(place: Path) -> None:
    place.chmod(0o1777)
    check(Wanted(f"{place}/new", makes=True))
    with pytest.raises(ImageError, match="another's file"):
        check(Wanted(make(place / "roots", 0, 0o666), makes=True))


def test_a_mode_must_be_what_it_is(place: Path) -> None:
    path = make(place / "file", 0, 0o666)
    check(Wanted(path, R, mode=0o100666))
    with pytest.raises(ImageError, match="another mode"):
        check(Wanted(path, R, mode=0o100600))


def test_files_of_the_view_are_homes_to_give(place: Path) -> None:
    path = make(place / "file", 0, 0o600)
    view = Mount(2, 77, str(place), "fuse.sshfs")
    check(Wanted(path, R | W), (view,), 77)
    with pytest.raises(ImageError):
        check(Wanted(path, R | W), (view, Mount(3, 78, path, "ext4")), 77)
    with pytest.raises(ImageError):
        check(Wanted(path, R | W), (view,), 0)


def test_no_other_proc_is_looked_into(place: Path) -> None:
    path = make(place / "kallsyms", 0, 0o444)
    with pytest.raises(ImageError, match="not for a guest"):
        check(Wanted(path, R), (Mount(2, 9, str(place), "proc"),))
