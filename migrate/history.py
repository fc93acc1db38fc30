"""The lines of `migctl log`."""

from __future__ import annotations

import time

import msgspec

from migrate.messages import HistoryRow
from migrate.pids import format_pid


def line(row: HistoryRow) -> str:
    """ "2026-11-21 11:50:54  RESUMED  → node2  0x82 alice  python3 primes.py"."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.since))
    way = f"{'→' if row.outgoing else '←'} {row.peer}"
    reason = f"  ({row.reason})" if row.reason else ""
    words = f"{when}  {row.state:<9} {way:<12} {format_pid(row.pid)} {row.user}  {row.command}"
    return "".join(c if c.isprintable() else "?" for c in f"{words}{reason}")


def as_json(row: HistoryRow) -> str:
    """The row as one JSON object."""
    return msgspec.json.encode(row).decode()
