"""The tables of `migctl ps` and `migctl group list`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from migrate.group_messages import MemberRow
from migrate.messages import GuestRow
from migrate.pids import format_pid

_TITLES = ("PID", "USER", "HOME", "WHERE", "SINCE", "PRIORITY", "STATE", "COMMAND")
_GROUP_TITLES = ("GROUP", "PID", "USER", "HOME", "WHERE", "COMMAND")
_PRIORITIES = ("low", "normal", "high")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def table(rows: Iterable[GuestRow], for_people: bool) -> Iterator[str]:
    """Aligned columns with titles for people, tab-separated values for programs."""
    cells = [
        (
            format_pid(row.pid),
            row.user,
            row.home,
            row.where,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.since)),
            _PRIORITIES[row.priority] if 0 <= row.priority < 3 else str(row.priority),
            _printable(row.state),
            _printable(row.command),
        )
        for row in rows
    ]
    yield from _aligned(_TITLES, cells, for_people)


def group_table(rows: Iterable[MemberRow], for_people: bool) -> Iterator[str]:
    """As `table`, by group and pid."""
    cells = [
        (
            str(row.group),
            format_pid(row.pid),
            row.user,
            row.home,
            row.where,
            _printable(row.command),
        )
        for row in sorted(rows, key=lambda row: (row.group, row.pid))
    ]
    yield from _aligned(_GROUP_TITLES, cells, for_people)


def _aligned(
    titles: tuple[str, ...], cells: Sequence[tuple[str, ...]], for_people: bool
) -> Iterator[str]:
    if not for_people:
        yield from ("\t".join(line) for line in cells)
        return
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]
    for line in [titles, *cells]:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
