"""The central daemon's checkpoint file: written seldom, believed carefully."""

import asyncio
import os
import resource
import signal
import sqlite3
from pathlib import Path

import pytest

from agent import load_checkpoint
from agent.load_checkpoint import Checkpoint, Contents, load, save
from agent.load_database import KnownHost

HOSTS = Contents(7, (KnownHost("a", 100.0), KnownHost("b", 0.0)))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "load.db"
    assert load(path) == Contents()
    written = save(path, {}, HOSTS)
    assert load(path) == HOSTS
    save(path, written, Contents(8, (KnownHost("b", 5.0),)))
    assert load(path) == Contents(8, (KnownHost("b", 5.0),))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_a_damaged_file_counts_as_empty_and_the_next_can_be_written(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "load.db"
    save(path, {}, Contents(7, tuple(KnownHost(f"host{n}", n) for n in range(500))))
    match damage:
        case "truncated":
            os.truncate(path, 5000)
        case "overwritten":
            path.write_bytes(b"no database at all, but long enough " * 100)
        case _:
            os.truncate(path, 0)
    assert load(path) == Contents()
    save(path, {}, HOSTS)
    assert load(path) == HOSTS


def test_a_burst_of_changes_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_checkpoint, "INTERVAL_SECONDS", 0.01)
    writes = []
    real = save

    def counted(path: Path, old: dict[str, float], contents: Contents) -> dict[str, float]:
        writes.append(contents)
        return real(path, old, contents)

    monkeypatch.setattr(load_checkpoint, "save", counted)

    async def run() -> None:
        checkpoint = Checkpoint(tmp_path / "load.db", lambda: HOSTS)
        checkpoint.start()
        for _ in range(1000):
            checkpoint.changed()
        while not writes or load(tmp_path / "load.db") != HOSTS:
            await asyncio.sleep(0.005)
        checkpoint.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert len(writes) == 1


def test_a_full_disk_is_told_once_and_what_is_missing_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(load_checkpoint, "INTERVAL_SECONDS", 0.01)
    path = tmp_path / "load.db"
    caplog.set_level("INFO")

    async def run() -> None:
        checkpoint = Checkpoint(path, lambda: HOSTS)
        checkpoint.start()
        # What a disk without space does to a file, a limit on its size does too.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
        try:
            for _ in range(5):
                checkpoint.changed()
                await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        while load(path) != HOSTS:
            checkpoint.changed()
            await asyncio.sleep(0.01)
        checkpoint.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    told = [record.getMessage() for record in caplog.records]
    assert sum("cannot be written" in line for line in told) == 1
    assert sum("is written again" in line for line in told) == 1


def test_the_file_is_a_plain_sqlite_database(tmp_path: Path) -> None:
    save(tmp_path / "load.db", {}, HOSTS)
    with sqlite3.connect(tmp_path / "load.db") as database:
        assert database.execute("SELECT name FROM host ORDER BY name").fetchall() == [
            ("a",),
            ("b",),
        ]
