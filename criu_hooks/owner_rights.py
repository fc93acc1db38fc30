"""Whether the owner of a guest could herself open and make the files that its images name.

Asked in the capsule, of the kernel, with the owner's ids. Files of the home view are home's: its server
acts as the owner there, whoever opens them here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from criu_hooks.image_format import ImageError
from criu_hooks.image_names import Wanted
from criu_hooks.images import Owner
from criu_hooks.mounts import Mount, MountTable

_NAMES = {os.R_OK: "read", os.W_OK: "write", os.X_OK: "enter"}


def check_wanted(
    wanted: Iterable[Wanted], owner: Owner, gid: int, mounts: MountTable, view_device: int
) -> None:
    """The calling process is root, of one thread, in the capsule, where no links are followed.

    :param gid: the owner's first group.
    :param mounts: the capsule's.
    :param view_device: of the home view, as st_dev; 0: there is none.
    :raises ImageError: with the first file that the owner may not have.
    """
    by_path = {mount.path: mount for mount in mounts.mounts}
    with _acting_as(owner, gid):
        for one in wanted:
            mount = _mount_of(one.path, by_path)
            if view_device and mount.device == view_device:
                continue
            if mount.fstype == "proc":
                raise ImageError(f"{one.path} is not for a guest")
            _check(one, owner.uid)


def _check(wanted: Wanted, uid: int) -> None:
    if wanted.makes:
        _check_making(wanted.path, uid)
    elif not os.access(wanted.path, wanted.access, effective_ids=True):
        what = " and ".join(name for bit, name in _NAMES.items() if wanted.access & bit) or "find"
        raise ImageError(f"their owner may not {what} {wanted.path} here")
    if wanted.mode is not None and os.lstat(wanted.path).st_mode != wanted.mode:
        raise ImageError(f"{wanted.path} has another mode here")


def _check_making(path: str, uid: int) -> None:
    directory = path.rpartition("/")[0] or "/"
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise ImageError(f"their owner may not make files in {directory} here")
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    if there.st_uid != uid or stat.S_ISLNK(there.st_mode):
        raise ImageError(f"{path} would take the place of another's file here")


def _mount_of(path: str, by_path: dict[str, Mount]) -> Mount:
    """The mount that a path without links leads to."""
    while path not in by_path and path != "/":
        path = path.rpartition("/")[0] or "/"
    return by_path[path]


@contextmanager
def _acting_as(owner: Owner, gid: int) -> Iterator[None]:
    groups = os.getgroups()
    os.setgroups(sorted(owner.gids))
    os.setegid(gid)
    try:
        os.seteuid(owner.uid)
        try:
            yield
        finally:
            os.seteuid(0)
    finally:
        os.setegid(0)
        os.setgroups(groups)
