"""The directory of a guard or keeper below /run/migrate/guests goes, with all that is mounted in it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path

from agent import syscalls
from criu_hooks.mounts import read_mounts

log = logging.getLogger(__name__)


def remove(directory: Path) -> None:
    """Unmount what is mounted below, whoever did it, and delete the directory.

    Nothing is deleted while anything is still mounted there: it may be somebody's home.
    """
    for point in reversed(_mounted_below(directory)):
        with contextlib.suppress(OSError):
            syscalls.umount(point, syscalls.MNT_DETACH)
    if left := _mounted_below(directory):
        log.error("%s: not removed: %s is still mounted", directory, left[0])
        return
    shutil.rmtree(directory, ignore_errors=True)


def _mounted_below(directory: Path) -> list[Path]:
    points = [Path(mount.path) for mount in read_mounts(os.getpid()).mounts]
    return [point for point in points if point.is_relative_to(directory)]
