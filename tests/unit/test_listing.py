"""The table of `migctl ps`: aligned for people, separated by tabs for programs."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.listing import table
from migrate.messages import GuestRow


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


SIMULATION = GuestRow(
    0x1A2B, "alice", "node1", "node12", 1_700_000_000.9, "away", "python3 simulate.py"
)
SLEEP = GuestRow(7, "bob", "node1", "node2", 1_700_000_061.0, "in doubt", "sleep 60", 0)


def test_people_get_titles_and_columns_that_line_up() -> None:
    assert list(table([SIMULATION, SLEEP], for_people=True)) == [
        "PID     USER   HOME   WHERE   SINCE                PRIORITY  STATE     COMMAND",
        "0x1a2b  alice  node1  node12  2023-11-14 22:13:20  normal    away      python3 simulate.py",
        "0x7     bob    node1  node2   2023-11-14 22:14:21  low       in doubt  sleep 60",
    ]


def test_programs_get_only_the_values() -> None:
    assert list(table([SIMULATION, SLEEP], for_people=False)) == [
        "0x1a2b\talice\tnode1\tnode12\t2023-11-14 22:13:20\tnormal\taway\tpython3 simulate.py",
        "0x7\tbob\tnode1\tnode2\t2023-11-14 22:14:21\tlow\tin doubt\tsleep 60",
    ]


def test_nobody_away_is_a_title_for_people_and_nothing_for_programs() -> None:
    assert list(table([], for_people=True)) == [
        "PID  USER  HOME  WHERE  SINCE  PRIORITY  STATE  COMMAND",
    ]
    assert list(table([], for_people=False)) == []


@pytest.mark.parametrize("for_people", [True, False])
@given(command=st.text())
def test_a_command_cannot_forge_a_line_a_column_or_a_color(for_people: bool, command: str) -> None:
    row = GuestRow(7, "bob", "node1", "node2", 0.0, "RESUMED", command)
    lines = list(table([row], for_people))
    assert len(lines) == 1 + for_people
    line = lines[-1]
    assert line.isprintable() or not for_people
    assert line.count("\t") == (0 if for_people else 7)
    assert all(character.isprintable() or character == "\t" for character in line)


def test_rows_may_come_from_a_generator() -> None:
    assert len(list(table((row for row in (SIMULATION, SLEEP)), for_people=True))) == 3
