"""Points at which a test can hold a migration, to kill something there or cut a cable.

A named pipe ``/run/migrate/faults/POINT`` (root only, as the directory is) makes whoever reaches the point wait:
opening it for writing is the test's rendezvous, closing it lets the migration go on. Without the directory a
point costs one failed open(2).
"""

from __future__ import annotations

import os

from migrate import paths

DIRECTORY = paths.RUN_DIR / "faults"


def reach(point: str) -> None:
    """Pass the point, or wait there until the test lets go."""
    try:
        fd = os.open(DIRECTORY / point, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.read(fd, 1)
    finally:
        os.close(fd)
