"""The central daemon's checkpoint file: which hosts there are, when each was last up, and the term.

Written in a thread, at most once a second. Claims are never in it. That it cannot be read or
written is logged once, and changes nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from agent.load_database import KnownHost

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS host (name TEXT PRIMARY KEY, last_up REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS term (id INTEGER PRIMARY KEY CHECK (id = 0), number INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class Contents:
    """What the file holds."""

    term: int = 0
    hosts: tuple[KnownHost, ...] = ()


def load(path: Path) -> Contents:
    """Read the file; one that makes no sense is put aside, and counts as empty."""
    if not path.exists():
        return Contents()
    try:
        with closing(sqlite3.connect(path, timeout=1.0)) as database:
            database.executescript(_SCHEMA)
            term = database.execute("SELECT number FROM term").fetchone()
            hosts = database.execute("SELECT name, last_up FROM host").fetchall()
        return Contents(
            int(term[0]) if term else 0,
            tuple(KnownHost(str(name)[:64], float(last_up)) for name, last_up in hosts),
        )
    except (sqlite3.Error, ValueError, TypeError) as error:
        aside = path.with_suffix(".bad")
        log.warning("%s cannot be read (%s); put aside as %s", path, error, aside.name)
        try:
            path.replace(aside)
        except OSError as failure:
            log.warning("%s cannot be put aside: %s", path, failure.strerror)
        return Contents()


def save(path: Path, old: Mapping[str, float], contents: Contents) -> dict[str, float]:
    """Write what has changed since `old`. :return: what the file holds now.

    :raises sqlite3.Error: it cannot be written.
    """
    new = {host.name: host.last_up for host in contents.hosts}
    changed = [(name, at) for name, at in new.items() if old.get(name) != at]
    gone = [(name,) for name in old if name not in new]
    with closing(sqlite3.connect(path, timeout=1.0)) as database, database:
        database.executescript(_SCHEMA)
        database.executemany("INSERT OR REPLACE INTO host VALUES (?, ?)", changed)
        database.executemany("DELETE FROM host WHERE name = ?", gone)
        database.execute("INSERT OR REPLACE INTO term VALUES (0, ?)", (contents.term,))
    return new


@dataclass
class Checkpoint:
    """Keeps the file up to date, for the running loop."""

    path: Path
    look: Callable[[], Contents]
    """tells what is to be written"""
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _written: dict[str, float] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None
    _writing: bool = False
    _again: bool = False
    _failed: bool = False

    def start(self, known: Iterable[KnownHost] = ()) -> None:
        """:param known: what the file holds already."""
        self._written = {host.name: host.last_up for host in known}

    def changed(self) -> None:
        """There is something new: it is written within a second, or right after what is being."""
        if self._writing:
            self._again = True
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(INTERVAL_SECONDS, self._write)

    def close(self) -> None:
        """Write no more; what is being written is finished."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pool.shutdown(wait=False)

    def _write(self) -> None:
        self._timer = None
        self._writing = True
        loop = asyncio.get_running_loop()
        job = loop.run_in_executor(self._pool, save, self.path, self._written, self.look())
        job.add_done_callback(self._done)

    def _done(self, job: asyncio.Future[dict[str, float]]) -> None:
        self._writing = False
        if job.cancelled():
            return
        error = job.exception()
        if error is None:
            self._written = job.result()
            if self._failed:
                log.info("%s is written again", self.path)
            self._failed = False
        elif not self._failed:
            self._failed = True
            log.error("%s cannot be written: %s", self.path, error)
            if type(error) is sqlite3.DatabaseError:  # not a database; a full disk is another class
                load(self.path)  # puts it aside
                self._written = {}
        if self._again:
            self._again = False
            self.changed()
