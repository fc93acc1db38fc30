"""Haste while a guest stands still: whoever works on its move goes before other work of the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

URGENT_NICE = -10


@contextmanager
def urgent() -> Iterator[None]:
    """Raise this process's priority inside; children inherit it. CRIU gives guests back their own."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, URGENT_NICE)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def hurry(pid: int) -> None:
    """Raise the priority of another process for good; it may be gone."""
    with suppress(PermissionError, ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, URGENT_NICE)
