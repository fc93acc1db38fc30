"""The journal decides: of two that settle a migration at once, one wins, whoever crashes when."""

import multiprocessing
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import journal as journal_module
from agent.journal import Entry, Journal, Side, State

ENTRY = Entry(
    transaction="t1",
    side=Side.SOURCE,
    state=State.BEGUN,
    guest="t1-node1",
    peer="node2",
    peer_boot_id="boot-of-node2",
    home="node1",
    pid=6699,
    starttime_ticks=123456,
    user="alice",
    uid=1001,
    command="python3 simulate.py",
    origin_cgroup="/user.slice/alice",
    reason="",
    since=1000.5,
    boot_id="",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal(path) as journal:
        yield journal


def reboot(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(journal_module, "boot_id", lambda: name)


def state_of(journal: Journal, transaction: str = "t1", side: Side = Side.SOURCE) -> State:
    entry = journal.find(transaction, side)
    assert entry is not None
    return entry.state


def test_what_was_recorded_is_found_after_a_restart(path: Path) -> None:
    with Journal(path) as first:
        first.record(ENTRY)
    with Journal(path) as second:
        found = second.find("t1", Side.SOURCE)
    assert found is not None
    assert found.boot_id != ""
    assert replace(found, boot_id="") == ENTRY


def test_it_is_for_root_only_and_synced(path: Path) -> None:
    with Journal(path) as journal:
        journal.record(ENTRY)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        (mode,) = journal._db.execute("PRAGMA synchronous").fetchone()
    assert mode == 2  # FULL


def test_unknown_migrations_are_not_found(journal: Journal) -> None:
    journal.record(ENTRY)
    assert journal.find("t2", Side.SOURCE) is None
    assert journal.find("t1", Side.DESTINATION) is None


def test_both_sides_of_one_migration_may_be_on_one_host(journal: Journal) -> None:
    journal.record(ENTRY)
    journal.record(replace(ENTRY, side=Side.DESTINATION, state=State.OFFERED))
    assert journal.move("t1", Side.DESTINATION, State.RESUMED, after=State.OFFERED)
    assert state_of(journal) is State.BEGUN
    assert state_of(journal, side=Side.DESTINATION) is State.RESUMED


def test_a_migration_is_recorded_once(journal: Journal) -> None:
    journal.record(ENTRY)
    with pytest.raises(sqlite3.IntegrityError):
        journal.record(replace(ENTRY, state=State.ABORTED))
    assert state_of(journal) is State.BEGUN


def test_the_first_mover_wins_and_the_second_is_told(path: Path, journal: Journal) -> None:
    journal.record(replace(ENTRY, side=Side.DESTINATION, state=State.OFFERED))
    with Journal(path) as other:
        assert journal.move(
            "t1", Side.DESTINATION, State.ABORTED, after=State.OFFERED, reason="gave up"
        )
        assert not other.move("t1", Side.DESTINATION, State.RESUMED, after=State.OFFERED)
        found = other.find("t1", Side.DESTINATION)
    assert found is not None
    assert (found.state, found.reason) == (State.ABORTED, "gave up")
    assert found.since > ENTRY.since


def _race(path: Path, state: State, start: object, results: object) -> None:
    with Journal(path) as journal:
        start.wait()  # type: ignore[attr-defined]
        for number in range(20):
            won = journal.move(f"t{number}", Side.DESTINATION, state, after=State.OFFERED)
            results.put((number, state, won))  # type: ignore[attr-defined]


def test_commit_and_abort_in_two_processes_never_both_win(path: Path) -> None:
    with Journal(path) as journal:
        for number in range(20):
            entry = replace(ENTRY, transaction=f"t{number}", side=Side.DESTINATION)
            journal.record(replace(entry, state=State.OFFERED))
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    racers = [
        context.Process(target=_race, args=(path, state, start, results))
        for state in (State.RESUMED, State.ABORTED)
    ]
    for racer in racers:
        racer.start()
    start.set()
    outcomes = [results.get(timeout=30) for _ in range(40)]
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    with Journal(path) as journal:
        for number in range(20):
            winners = [state for n, state, won in outcomes if n == number and won]
            assert winners == [state_of(journal, f"t{number}", Side.DESTINATION)]


def test_moving_what_is_not_there_says_so(journal: Journal) -> None:
    assert not journal.move("t1", Side.SOURCE, State.COMMITTED, after=State.BEGUN)


_ONWARD = {
    State.BEGUN: (State.COMMITTED, State.ABORTED),
    State.COMMITTED: (State.RESUMED, State.ABORTED, State.ENDED),
    State.RESUMED: (State.ENDED,),
}


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(State), st.sampled_from(State)), max_size=8))
def test_a_move_writes_only_from_the_state_it_names(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[State, State]]
) -> None:
    expected = State.BEGUN
    with Journal(tmp_path_factory.mktemp("journal") / "journal.db") as journal:
        journal.record(ENTRY)
        for after, state in moves:
            if after is expected and state not in _ONWARD.get(expected, ()):
                continue
            moved = journal.move("t1", Side.SOURCE, state, after=after)
            assert moved == (after is expected)
            if moved:
                expected = state
            assert state_of(journal) is expected


@pytest.mark.parametrize(
    ("state", "back"),
    [
        (State.ABORTED, State.RESUMED),
        (State.ABORTED, State.COMMITTED),
        (State.ENDED, State.RESUMED),
        (State.RESUMED, State.COMMITTED),
        (State.RESUMED, State.BEGUN),
    ],
)
def test_states_never_go_back(journal: Journal, state: State, back: State) -> None:
    journal.record(ENTRY)
    before = State.BEGUN if state is State.ABORTED else State.COMMITTED
    if before is State.COMMITTED:
        assert journal.move("t1", Side.SOURCE, State.COMMITTED, after=State.BEGUN)
    assert journal.move("t1", Side.SOURCE, state, after=before)
    assert not journal.move("t1", Side.SOURCE, back, after=state)
    assert state_of(journal) is state


def test_a_deputy_is_one_only_while_its_guest_runs(journal: Journal) -> None:
    journal.record(ENTRY)
    assert journal.deputy(6699) is None
    journal.move("t1", Side.SOURCE, State.COMMITTED, after=State.BEGUN)
    assert journal.deputy(6699) is None
    journal.move("t1", Side.SOURCE, State.RESUMED, after=State.COMMITTED)
    found = journal.deputy(6699)
    assert found is not None
    assert found.transaction == "t1"
    assert journal.deputy(6698) is None
    journal.move("t1", Side.SOURCE, State.ENDED, after=State.RESUMED)
    assert journal.deputy(6699) is None


def test_a_deputy_is_one_only_of_this_boot(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reboot(monkeypatch, "boot 1")
    with Journal(path) as before:
        before.record(replace(ENTRY, state=State.RESUMED))
        assert before.deputy(6699) is not None
    reboot(monkeypatch, "boot 2")
    with Journal(path) as after:
        assert after.deputy(6699) is None
        found = after.find("t1", Side.SOURCE)
        assert found is not None
        assert found.boot_id == "boot 1"


def test_neither_a_hop_nor_the_far_end_makes_a_deputy(journal: Journal) -> None:
    journal.record(replace(ENTRY, state=State.RESUMED, origin_cgroup=""))
    journal.record(replace(ENTRY, transaction="t2", side=Side.DESTINATION, state=State.RESUMED))
    assert journal.deputy(6699) is None


def test_a_guest_that_hops_on_is_found_at_its_new_host(journal: Journal) -> None:
    journal.record(replace(ENTRY, state=State.RESUMED))
    journal.record(replace(ENTRY, side=Side.DESTINATION, state=State.OFFERED))
    journal.relocate("t1", "node3", "boot-of-node3")
    entry = journal.deputy(6699)
    assert entry is not None
    assert (entry.peer, entry.peer_boot_id) == ("node3", "boot-of-node3")
    assert entry.state is State.RESUMED
    assert entry.since > ENTRY.since
    far = journal.find("t1", Side.DESTINATION)
    assert far is not None
    assert far.peer == "node2"


def test_those_in_some_states_come_oldest_first(journal: Journal) -> None:
    for name, state, since in [
        ("new", State.COMMITTED, 30.0),
        ("old", State.BEGUN, 10.0),
        ("done", State.ABORTED, 5.0),
        ("middle", State.OFFERED, 20.0),
    ]:
        journal.record(replace(ENTRY, transaction=name, state=state, since=since))
    open_ones = journal.in_state(State.BEGUN, State.COMMITTED, State.OFFERED)
    assert [entry.transaction for entry in open_ones] == ["old", "middle", "new"]
    assert [entry.transaction for entry in journal.in_state(State.ABORTED)] == ["done"]
    assert journal.in_state(State.ENDED) == []


def test_no_text_is_taken_for_sql(journal: Journal) -> None:
    nasty = "x'); DROP TABLE migration; --"
    journal.record(replace(ENTRY, transaction=nasty, command=nasty, reason='"'))
    found = journal.find(nasty, Side.SOURCE)
    assert found is not None
    assert (found.command, found.reason) == (nasty, '"')


def test_a_journal_of_an_earlier_version_is_read_on(path: Path) -> None:
    with Journal(path) as first:
        first.record(ENTRY)
    with sqlite3.connect(path) as old:
        old.execute("ALTER TABLE migration DROP COLUMN priority")
    old.close()
    with Journal(path) as journal:
        journal.record(replace(ENTRY, transaction="t2", priority=0))
        assert [entry.priority for entry in journal.in_state(State.BEGUN)] == [1, 0]


def test_a_reason_stays_until_there_is_another(journal: Journal) -> None:
    journal.record(replace(ENTRY, reason="evicted"))
    journal.move("t1", Side.SOURCE, State.COMMITTED, after=State.BEGUN)
    journal.move("t1", Side.SOURCE, State.RESUMED, after=State.COMMITTED)
    found = journal.find("t1", Side.SOURCE)
    assert found is not None and found.reason == "evicted"
    journal.move("t1", Side.SOURCE, State.ENDED, after=State.RESUMED, reason="gone")
    found = journal.find("t1", Side.SOURCE)
    assert found is not None and found.reason == "gone"
