"""What `rup`, `loadavg`, `migctl set` and `migctl log` make of words and records."""

import json

import pytest

from migrate import history, load_table
from migrate.errors import UserError
from migrate.limits import parse_limits
from migrate.messages import HistoryRow
from migrate.mig_messages import GuestCount, HostInfo, HostState, Priority, SetLimits

NODE2 = HostInfo(
    name="node2",
    id=2,
    machine="x86_64",
    state=HostState.PART_USED,
    accepts=True,
    loads=(0.5, 1.25, 2.0),
    idle_seconds=3 * 3600 + 7 * 60 + 8,
    guests=(
        GuestCount(1002, "bob", "node1", Priority.NORMAL, 1),
        GuestCount(1001, "alice", "node1", Priority.NORMAL, 1),
        GuestCount(1001, "alice", "node3", Priority.LOW, 2),
    ),
)
DOWN = HostInfo(name="node3", id=3)


def test_a_row_for_programs() -> None:
    row = "node2\tx86_64\tPART_USED\tyes\t0.50 1.25 2.00\t3:07\talice 3, bob 1\n"
    assert load_table.plain([NODE2]) == row


def test_of_a_host_that_is_down_only_the_last_sign_of_life_is_shown() -> None:
    assert load_table.plain([DOWN]) == "node3\t-\tDOWN\t-\tnever up\t-\t-\n"


def test_a_table_for_people_has_sprites_titles_and_a_line_a_host() -> None:
    lines = load_table.for_people([NODE2, DOWN], colour=False, width=120).splitlines()
    assert lines[0].split("  ")[0] == "HOST"
    assert [title for title in load_table.TITLES if title not in lines[0]] == []
    assert [line.split()[0] for line in lines[1:]] == ["node2", "node3"]


def test_nothing_that_a_host_says_can_steer_a_terminal() -> None:
    evil = HostInfo(name="a\x1b[2J", id=1, state=HostState.IDLE, machine="b\tc\n")
    assert "\x1b" not in load_table.plain([evil])
    assert load_table.plain([evil]).count("\n") == 1
    assert "\x1b" not in load_table.for_people([evil], colour=False, width=99)


def test_json_has_all_fields() -> None:
    (shown,) = json.loads(load_table.as_json([NODE2]))
    assert set(shown) == set(HostInfo.__struct_fields__)
    assert shown["state"] == "PART_USED"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "0:01"), (3600, "1:00"), (86400 * 2 + 11040, "2+03:04")],
)
def test_durations(seconds: float, text: str) -> None:
    assert load_table.duration(seconds) == text


def test_limits_are_parsed() -> None:
    words = ["idle_seconds=5", "load_accept=.75,1,1.5", "guest_slots=2"]
    assert parse_limits(words) == SetLimits(5.0, (0.75, 1.0, 1.5), None, 2)


@pytest.mark.parametrize(
    "word",
    [
        "idle",
        "what=3",
        "idle_seconds=",
        "idle_seconds=x",
        "idle_seconds=nan",
        "idle_seconds=-1",
        "load_accept=1",
        "load_accept=1,2",
        "load_stop=1,2,inf",
        "guest_slots=1.5",
        "idle_seconds=1,2",
    ],
)
def test_wrong_limits_are_refused(word: str) -> None:
    with pytest.raises(UserError):
        parse_limits([word])


def test_a_line_of_the_log_is_one_line_with_the_reason() -> None:
    row = HistoryRow(0.0, "ABORTED", True, "node2", 26, "alice", "node1", "it said\nno", "x\x1by")
    line = history.line(row)
    assert line.endswith("0x1a alice  x?y  (it said?no)")
    assert "→ node2" in line
