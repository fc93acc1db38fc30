"""The table of hosts: HOST TYPE STATUS MIG LOAD IDLE GUESTS, for people, for programs, as JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import msgspec

from migrate.mig_messages import HostInfo, HostState

TITLES = ("HOST", "TYPE", "STATUS", "MIG", "LOAD AVERAGE", "IDLE TIME", "GUESTS")
_COLOURS = {
    HostState.IDLE: "green",
    HostState.PART_USED: "cyan",
    HostState.FULL: "blue",
    HostState.ACTIVE: "yellow",
    HostState.REFUSES: "magenta",
    HostState.DOWN: "red",
}


def duration(seconds: float) -> str:
    """ "2+03:04" is two days, three hours, four minutes; "0:07" seven minutes; "42s" less than one."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}+{hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}"


def guests(host: HostInfo) -> str:
    """Who has guests there: "alice 2, bob 1"; "" if there are none."""
    counts: dict[str, int] = {}
    for guest in host.guests:
        counts[guest.user] = counts.get(guest.user, 0) + guest.count
    return ", ".join(f"{user} {count}" for user, count in sorted(counts.items()))


def cells(host: HostInfo) -> tuple[str, ...]:
    """A row of the table."""
    if host.state is HostState.DOWN:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(host.last_up))
        since = f"last up {last}" if host.last_up else "never up"
        return (host.name, host.machine or "-", host.state.value, "-", since, "-", "-")
    return tuple(
        _printable(cell)
        for cell in (
            host.name,
            host.machine,
            host.state.value,
            "yes" if host.accepts else "no",
            " ".join(f"{load:.2f}" for load in host.loads),
            duration(host.idle_seconds),
            guests(host) or "-",
        )
    )


def plain(hosts: Iterable[HostInfo]) -> str:
    """Tab-separated, no titles: for programs."""
    return "".join("\t".join(cells(host)) + "\n" for host in hosts)


def as_json(hosts: Sequence[HostInfo]) -> str:
    """An array of objects with the fields of HostInfo."""
    return msgspec.json.format(msgspec.json.encode(list(hosts)), indent=2).decode() + "\n"


def for_people(hosts: Sequence[HostInfo], *, colour: bool = True, width: int | None = None) -> str:
    """A table with titles, the states in colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold" if colour else "")
    for title in TITLES:
        table.add_column(title, no_wrap=title != "GUESTS")
    for host in hosts:
        row = [Text(cell) for cell in cells(host)]
        row[2].stylize(_COLOURS[host.state])
        table.add_row(*row)
    console = Console(no_color=not colour, highlight=False, width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
