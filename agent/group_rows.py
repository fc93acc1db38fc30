"""What a client is told of a process that is in a group."""

from __future__ import annotations

import os
import pwd
from functools import lru_cache

from agent.group_places import Places
from agent.group_words import Identity
from criu_hooks.proc import ProcDir, parse_stat
from migrate.group_messages import MemberRow

COMMAND_LETTERS = 200


def row_of(process: Identity, group: int, places: Places) -> MemberRow | None:
    """None: it has ended, or is at home again in a capsule, where its deputy stands for it."""
    pid, here = process.pid, places.host
    try:
        with ProcDir(pid) as proc:
            stat = parse_stat(proc.read("stat"))
            uid = os.fstat(proc.fd).st_uid
            line = proc.read_bytes("cmdline")
    except OSError:
        return None
    if stat.starttime_ticks != process.starttime_ticks or places.has_deputy(process):
        return None
    entry = places.deputies.get(process)
    if entry is not None:
        return MemberRow(pid, group, entry.user, here, entry.peer, entry.command)
    inmate = places.inmate(pid)
    home = inmate.offer.home if inmate is not None else here
    words = line.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    return MemberRow(
        pid, group, user_name(uid), home, here, words[:COMMAND_LETTERS] or f"[{stat.comm}]"
    )


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """His name, or if he has none his number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
