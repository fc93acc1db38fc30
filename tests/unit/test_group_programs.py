"""joingroup, showgroup, migrategroup, resetgroup: what they say, with migd's answers given."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import client, group_programs, messages
from migrate import group_messages as words
from migrate.errors import UserError
from migrate.group_asking import parse_group, parse_host


class Migd:
    """Answers what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[messages.Request] = []
        self.replies: dict[type, list[messages.Reply]] = {}

    def ask(self, request: messages.Request) -> Iterator[messages.Reply]:
        self.asked.append(request)
        return iter([self.replies[type(request)].pop(0)])


@pytest.fixture
def migd(monkeypatch: pytest.MonkeyPatch) -> Migd:
    made = Migd()
    monkeypatch.setattr(client, "ask", made.ask)
    return made


def status(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> object:
    """The exit status of a program."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        getattr(group_programs, program)()
    return ended.value.code


def row(pid: int, command: str = "bash") -> words.MemberRow:
    return words.MemberRow(pid, 1, "alice", "node1", "node2", command)


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("007", 7), ("2147483647", 2147483647)])
def test_groups_are_decimal(text: str, number: int) -> None:
    assert parse_group(text) == number


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "0x1", "2147483648", "9" * 99, "١", " 1"])
def test_what_is_no_group_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_group(text)


def test_a_host_is_an_id_or_a_name() -> None:
    assert parse_host("2") == ("", 2)
    assert parse_host("node2") == ("node2", 0)
    for wrong in ("", "0", "65536", "123456"):
        with pytest.raises(UserError):
            parse_host(wrong)


def test_joingroup_takes_both_kinds_of_pids(
    migd: Migd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migd.replies[words.JoinGroup] = [
        words.Joined((1300,), (words.Unjoined(26, "belongs to bob", "ask him"),))
    ]
    assert status(monkeypatch, "joingroup", "1300", "0x1a", "1") == 1
    assert migd.asked == [words.JoinGroup((1300, 26), 1)]
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "miggroup = 1",
        "processes = 1300 26",
        "process 1300 joins the miggroup 1 now",
    ]
    assert told.err == "joingroup: pid 26: belongs to bob; ask him\n"


def test_showgroup_asks_until_there_are_no_more(
    migd: Migd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migd.replies[words.ListGroup] = [
        words.GroupMembers((row(1300), row(1332)), more_after=1340),
        words.GroupMembers((row(1364, "a\x1b[2Jb\n"),)),
    ]
    assert status(monkeypatch, "showgroup", "1") == 0
    assert migd.asked == [words.ListGroup(1), words.ListGroup(1, 1340)]
    assert capsys.readouterr().out.splitlines() == [
        "1300 with commandline bash belongs to 1",
        "1332 with commandline bash belongs to 1",
        "1364 with commandline a?[2Jb? belongs to 1",
    ]


def test_showgroup_in_json(
    migd: Migd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migd.replies[words.ListGroup] = [words.GroupMembers((row(1300),))]
    assert status(monkeypatch, "showgroup", "--json", "1") == 0
    process = {
        "pid": 1300,
        "command": "bash",
        "user": "alice",
        "home": "node1",
        "where": "node2",
    }
    assert json.loads(capsys.readouterr().out) == {"group": 1, "processes": [process]}


def test_migrategroup_tells_of_each_once(
    migd: Migd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    migd.replies[words.PlanGroup] = [
        words.GroupPlan(
            (
                words.GroupTree(1300, (1300, 1332)),
                words.GroupTree(1364, (1364,), there=True),
                words.GroupTree(1396, (1396,)),
            ),
            (words.Stuck((1428,), (words.Reason("fd 3", "is a lock", "drop it"),)),),
        )
    ]
    replies: dict[int, messages.Reply] = {
        1300: messages.Moved(1300, "node2", 40.0, 1 << 20),
        1396: messages.Refused((messages.Obstacle("pid 1396", "has ended"),)),
    }
    asked = migd.ask

    def answer(request: messages.Request) -> Iterator[messages.Reply]:
        if isinstance(request, messages.Move):
            assert (request.host, request.host_id) == ("", 2)
            return iter([replies[request.pid]])
        return asked(request)

    monkeypatch.setattr(client, "ask", answer)
    assert status(monkeypatch, "migrategroup", "1", "2") == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "migrate 1300 to 2",
        "migrate 1332 to 2",
        "1364 is on 2 already",
    ]
    assert told.err.splitlines() == [
        "migrategroup: 1428 not migrated to 2: fd 3: is a lock; drop it",
        "migrategroup: 1396 not migrated to 2: pid 1396: has ended",
    ]


@pytest.mark.parametrize(
    "words_",
    [("joingroup", "1300"), ("showgroup",), ("migrategroup", "1"), ("resetgroup", "1", "2")],
)
def test_too_few_or_many_words(
    migd: Migd,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words_: tuple[str, ...],
) -> None:
    assert status(monkeypatch, *words_) == 125
    assert not migd.asked
    assert capsys.readouterr().err.startswith(f"{words_[0]}: usage: {words_[0]} ")


@pytest.mark.parametrize("program", ["joingroup", "showgroup", "migrategroup", "resetgroup"])
def test_help(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(monkeypatch, program, "--help") == 0
    assert capsys.readouterr().out.startswith(f"Usage: {program} ")


@pytest.mark.parametrize("program", ["joingroup", "showgroup", "migrategroup", "resetgroup"])
def test_the_man_page_has_every_program(program: str) -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / f"{program}.1").read_text()
    if page.startswith(".so man1/"):
        page = (docs / page.split("/")[1].strip()).read_text()
    assert f"\n.B {program}\n" in page.partition(".SH SYNOPSIS")[2].partition(".SH ")[0]
