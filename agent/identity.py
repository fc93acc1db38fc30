"""Under which ids CRIU runs."""

from __future__ import annotations

import os
from pathlib import Path


def take_identity(uid: int, gid: int) -> None:
    """Before exec of criu, where root lacks CAP_SYS_RESOURCE: take the target's real ids.

    With them criu may still read and set its limits (prlimit compares them); the effective ids
    stay root's.
    """
    if not _has_sys_resource():
        os.setresgid(gid, 0, 0)
        os.setresuid(uid, 0, 0)


def _has_sys_resource() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 24 & 1)
    return False
