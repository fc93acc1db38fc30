"""The screen of `migctl top`: hosts and guests, looked at again and again."""

from __future__ import annotations

import sys
import time
from itertools import count as numbers

from migrate import load_table, mig
from migrate.errors import MigrateError

CLEAR = "\033[H\033[J"


def screen() -> str:
    """What it shows now."""
    stats = mig.get_stats()
    head = (
        f"{stats.central} is the central daemon · {stats.hosts} hosts, {stats.available} available,"
        f" {stats.claims} claimed by {stats.clients} clients · {time.strftime('%H:%M:%S')}\n\n"
    )
    hosts = mig.get_all_info()
    if sys.stdout.isatty():
        return CLEAR + head + load_table.for_people(hosts)
    return head + load_table.plain(hosts)


def show(seconds: float, count: int) -> None:
    """Until ^C, or `count` times."""
    for number in numbers(1):
        try:
            text = screen()
        except MigrateError as error:
            text = f"{CLEAR if sys.stdout.isatty() else ''}{error}\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        if number == count:
            return
        time.sleep(seconds)
