"""Which process is in which group, over restarts."""

import os
import subprocess
from pathlib import Path

import pytest

from agent.group_book import GroupBook
from agent.group_files import Process
from agent.group_words import Identity


@pytest.fixture
def me() -> Identity:
    """This process."""
    return Process.look(os.getpid()).identity


def test_a_process_is_in_no_group_at_first(tmp_path: Path, me: Identity) -> None:
    assert GroupBook(tmp_path / "groups").group(me) == 0


def test_the_next_book_knows_what_was_put(tmp_path: Path, me: Identity) -> None:
    parent = Process.look(os.getppid()).identity
    book = GroupBook(tmp_path / "groups")
    book.put({me: 7, parent: 8})
    again = GroupBook(tmp_path / "groups")
    assert (again.group(me), again.group(parent)) == (7, 8)
    assert again.members(7) == [(me, 7)]
    again.put({me: 0})
    assert GroupBook(tmp_path / "groups").members() == [(parent, 8)]
    assert (tmp_path / "groups").stat().st_mode & 0o777 == 0o600


def test_a_pid_that_is_used_again_starts_in_no_group(tmp_path: Path, me: Identity) -> None:
    earlier = Identity(me.pid, me.starttime_ticks - 1)
    book = GroupBook(tmp_path / "groups")
    book.put({earlier: 7})
    assert book.group(me) == 0
    assert book.members(7) == []
    assert GroupBook(tmp_path / "groups").members() == []


def test_who_has_ended_is_a_member_no_longer(tmp_path: Path) -> None:
    book = GroupBook(tmp_path / "groups")
    with subprocess.Popen(["sleep", "600"]) as process:
        member = Process.look(process.pid).identity
        book.put({member: 7})
        assert book.members(7) == [(member, 7)]
        process.kill()
    assert book.members(7) == []


def test_a_broken_file_does_not_stop_migd(tmp_path: Path, me: Identity) -> None:
    (tmp_path / "groups").write_bytes(b"\xff\xff rubbish")
    book = GroupBook(tmp_path / "groups")
    book.put({me: 7})
    assert GroupBook(tmp_path / "groups").group(me) == 7


def test_what_a_guest_brought_counts_once(tmp_path: Path, me: Identity) -> None:
    book = GroupBook(tmp_path / "groups")
    book.settle("t1", {me: 7})
    book.put({me: 8})
    GroupBook(tmp_path / "groups").settle("t1", {me: 7})
    assert GroupBook(tmp_path / "groups").group(me) == 8
