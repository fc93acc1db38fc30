"""What must be known after a crash: the migrations of this host and their state (sqlite, synced).

Written by migd, guards and keepers, each with its own connection. A row is never taken back: states only go on.
"""

from __future__ import annotations

import contextlib
import enum
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.link import Offer
from criu_hooks.proc import boot_id
from migrate import paths


class State(enum.StrEnum):
    """Of a migration, at its source or its destination."""

    BEGUN = "BEGUN"
    """source: frozen or about to be"""
    COMMITTED = "COMMITTED"
    """source: the original will not run unless the destination has recorded ABORTED or rebooted"""
    OFFERED = "OFFERED"
    """destination: accepted"""
    RESUMED = "RESUMED"
    ABORTED = "ABORTED"
    ENDED = "ENDED"
    """the guest has ended"""


class Side(enum.StrEnum):
    """Which end of the migration this host is."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True)
class Entry:
    """One migration as this host sees it."""

    transaction: str
    side: Side
    state: State
    guest: str
    peer: str
    peer_boot_id: str
    home: str
    pid: int
    starttime_ticks: int
    user: str
    uid: int
    command: str
    origin_cgroup: str
    """where the original was; empty for a hop, whose source is a keeper"""
    reason: str
    since: float
    """seconds since the epoch"""
    boot_id: str
    priority: int = 1
    """as migrate.mig_messages.Priority"""

    @classmethod
    def begin(
        cls,
        offer: Offer,
        side: Side,
        peer: str,
        *,
        peer_boot_id: str = "",
        starttime_ticks: int = 0,
        origin_cgroup: str = "",
    ) -> Entry:
        """The first entry of the migration that `offer` is about, at either end of it."""
        return cls(
            transaction=offer.transaction,
            side=side,
            state=State.BEGUN if side is Side.SOURCE else State.OFFERED,
            guest=offer.guest,
            peer=peer,
            peer_boot_id=peer_boot_id,
            home=offer.home,
            pid=offer.ids.pid,
            starttime_ticks=starttime_ticks,
            user=offer.owner.name,
            uid=offer.owner.uid,
            command=offer.command,
            origin_cgroup=origin_cgroup,
            reason=offer.reason,
            since=time.time(),
            boot_id=boot_id(),
            priority=offer.priority,
        )


_SCHEMA = """
CREATE TABLE IF NOT EXISTS migration (
    id TEXT NOT NULL, side TEXT NOT NULL, state TEXT NOT NULL, guest TEXT NOT NULL,
    peer TEXT NOT NULL, peer_boot_id TEXT NOT NULL, home TEXT NOT NULL, pid INTEGER NOT NULL,
    starttime_ticks INTEGER NOT NULL, user TEXT NOT NULL, uid INTEGER NOT NULL, command TEXT NOT NULL,
    origin_cgroup TEXT NOT NULL, reason TEXT NOT NULL, since REAL NOT NULL, boot_id TEXT NOT NULL,
    priority INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (id, side)
)
"""
_COLUMNS = (
    "id, side, state, guest, peer, peer_boot_id, home, pid, starttime_ticks, user, uid, command,"
    " origin_cgroup, reason, since, boot_id, priority"
)
_NEXT = {
    State.BEGUN: {State.COMMITTED, State.ABORTED},
    State.OFFERED: {State.RESUMED, State.ABORTED},
    State.COMMITTED: {State.RESUMED, State.ABORTED, State.ENDED},
    State.RESUMED: {State.ENDED},
    State.ABORTED: set[State](),
    State.ENDED: set[State](),
}


class Journal:
    """A connection to the journal of this host. Every `record` and `move` is on disk when it returns."""

    def __init__(self, path: Path = paths.JOURNAL) -> None:
        self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
        path.chmod(0o600)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(_SCHEMA)
        self._add_what_is_new()
        self._boot_id = boot_id()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def record(self, entry: Entry) -> None:
        """Write a new migration down."""
        self._db.execute(
            f"INSERT INTO migration ({_COLUMNS}) VALUES ({', '.join('?' * 17)})",
            (
                entry.transaction,
                entry.side,
                entry.state,
                entry.guest,
                entry.peer,
                entry.peer_boot_id,
                entry.home,
                entry.pid,
                entry.starttime_ticks,
                entry.user,
                entry.uid,
                entry.command,
                entry.origin_cgroup,
                entry.reason,
                entry.since,
                self._boot_id,
                entry.priority,
            ),
        )

    def _add_what_is_new(self) -> None:
        """A journal of an earlier version may lack a column."""
        present = [row[1] for row in self._db.execute("PRAGMA table_info(migration)")]
        if "priority" not in present:
            with contextlib.suppress(sqlite3.OperationalError):  # somebody else has just done it
                self._db.execute(
                    "ALTER TABLE migration ADD COLUMN priority INTEGER NOT NULL DEFAULT 1"
                )

    def move(
        self, transaction: str, side: Side, state: State, *, after: State, reason: str = ""
    ) -> bool:
        """From state `after` to `state`; False (and nothing written) if it is in another state.

        This is what decides between a commit and an abort that happen at the same time.
        A step that no migration takes (say from ABORTED to RESUMED) is refused as well. Without a
        new reason the old one stays.
        """
        if state not in _NEXT[after]:
            return False
        cursor = self._db.execute(
            "UPDATE migration SET state = ?, reason = coalesce(nullif(?, ''), reason), since = ?"
            " WHERE id = ? AND side = ? AND state = ?",
            (state, reason, time.time(), transaction, side, after),
        )
        return cursor.rowcount == 1

    def relocate(self, transaction: str, host: str, boot_id: str) -> None:
        """The guest of a source's migration runs on another host now."""
        self._db.execute(
            "UPDATE migration SET peer = ?, peer_boot_id = ?, since = ? WHERE id = ? AND side = ?",
            (host, boot_id, time.time(), transaction, Side.SOURCE),
        )

    def deputy(self, pid: int) -> Entry | None:
        """The migration that has made `pid` a deputy, if it is one (of this boot)."""
        found = self._select(
            "WHERE pid = ? AND side = ? AND state = ? AND boot_id = ? AND origin_cgroup != ''",
            (pid, Side.SOURCE, State.RESUMED, self._boot_id),
        )
        return found[-1] if found else None

    def find(self, transaction: str, side: Side) -> Entry | None:
        """The migration, if it is known."""
        rows = self._select("WHERE id = ? AND side = ?", (transaction, side))
        return rows[0] if rows else None

    def in_state(self, *states: State) -> list[Entry]:
        """All migrations in one of the states, oldest first."""
        marks = ", ".join("?" * len(states))
        return self._select(f"WHERE state IN ({marks}) ORDER BY since", states)

    def latest(self, count: int) -> list[Entry]:
        """The last migrations that something has happened to, the newest last."""
        return self._select("ORDER BY since DESC LIMIT ?", (count,))[::-1]

    def _select(self, where: str, values: tuple[object, ...]) -> list[Entry]:
        rows = self._db.execute(f"SELECT {_COLUMNS} FROM migration {where}", values)
        return [Entry(row[0], Side(row[1]), State(row[2]), *row[3:]) for row in rows]
