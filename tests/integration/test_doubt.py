"""Committed, and the destination has not said RESUMED: only proof, or an administrator's word, undoes that."""

import subprocess

import pytest
from holding import await_reached, held, let_go
from moving import PATIENCE_SECONDS, Desk, Shell, agent_pids, guests_at, until

LONG_SECONDS = 90.0
"""For what waits for a host to boot, or for a connection to be found dead."""


def counter(desk: Desk) -> tuple[Shell, int]:
    """A program that counts at home. Its host's connections are new: node2 may just have been restarted."""
    desk.nodes.restart_migd(desk.home)
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    return shell, pid


def start_move(desk: Desk, pid: int, host: str) -> subprocess.Popen[bytes]:
    """Begin a move that the test will disturb."""
    return desk.nodes.popen(desk.home, ["migrate", "-p", str(pid), "-h", host], user=desk.user)


def complaint(client: subprocess.Popen[bytes]) -> str:
    """What a move that was disturbed says in the end: one line, and 125."""
    _, told = client.communicate(timeout=LONG_SECONDS)
    assert client.returncode == 125, told
    line = told.decode()
    assert line.count("\n") == 1, line
    return line


def in_doubt(desk: Desk) -> bool:
    """Whether migctl lists something at home as in doubt."""
    return "in doubt" in desk.nodes.sh(desk.home, "migctl ps")


def runs_at_home(desk: Desk, shell: Shell, pid: int) -> None:
    """The original goes on to its end, as if nothing had happened; every number was counted once."""
    before = desk.ids(pid)
    until(lambda: not in_doubt(desk), "nothing is in doubt", LONG_SECONDS)
    desk.grows("out")
    assert not any(guests_at(desk.nodes, node) for node in desk.nodes.names)
    desk.enough()
    assert shell.status() == 7
    counted = desk.count()
    assert counted.unbroken
    assert counted.words == ["enough"]
    assert counted.ids == {before}


@pytest.mark.parametrize("point", ["destination-commit", "destination-recorded"])
def test_a_restarted_destination_has_nothing_of_it_so_the_original_runs_on(
    desk: Desk, point: str
) -> None:
    """Nobody says anything: the changed boot id is the proof."""
    shell, pid = counter(desk)
    with held(desk.nodes, "node2", point) as holder:
        client = start_move(desk, pid, "node2")
        await_reached(holder, client)
        desk.nodes.kill("node2")
        assert "node2" in complaint(client)
        assert in_doubt(desk)
        again = desk.migrate("-p", str(pid), "-h", "node3")
        assert f"pid {pid}: its move to node2 is in doubt" in again.stderr
        stood = desk.lines("out")
        desk.nodes.boot("node2")
        until(lambda: desk.lines("out") > stood, "the original runs", LONG_SECONDS)
    runs_at_home(desk, shell, pid)


@pytest.mark.parametrize("point", ["destination-commit", "destination-recorded"])
def test_an_administrators_word_that_a_host_is_lost_lets_the_original_run(
    desk: Desk, point: str
) -> None:
    shell, pid = counter(desk)
    with held(desk.nodes, "node2", point) as holder:
        client = start_move(desk, pid, "node2")
        await_reached(holder, client)
        desk.nodes.kill("node2")
        assert "migctl recover" in complaint(client)
        stood = desk.lines("out")
        said = desk.nodes.sh("node1", "migctl recover --lost node2")
        assert f"pid {pid} runs here again" in said
        until(lambda: desk.lines("out") > stood, "the original runs", PATIENCE_SECONDS)
        desk.nodes.boot("node2")
        desk.grows("out")
    runs_at_home(desk, shell, pid)


def test_a_host_that_was_not_lost_after_all_ends_its_copy(desk: Desk) -> None:
    """It was cut off with a guest that had resumed, and the administrator gave it up."""
    shell, pid = counter(desk)
    with held(desk.nodes, "node2", "destination-recorded") as holder:
        client = start_move(desk, pid, "node2")
        await_reached(holder, client)
        desk.nodes.cut("node2")
        let_go(holder)
        complaint(client)
        until(lambda: guests_at(desk.nodes, "node2") == {pid}, "the guest is there")
        stood = desk.lines("out")
        desk.nodes.sh("node1", "migctl recover --lost node2")
        until(lambda: desk.lines("out") > stood, "the original runs", PATIENCE_SECONDS)
        desk.nodes.heal("node2")
        until(lambda: not guests_at(desk.nodes, "node2"), "the copy is dead", LONG_SECONDS)
    runs_at_home(desk, shell, pid)


def test_recover_of_nothing_says_so_and_is_roots_alone(desk: Desk) -> None:
    assert desk.nodes.sh("node1", "migctl recover") == "nothing is in doubt"
    told = desk.nodes.exec("node1", ["migctl", "recover"], user="alice", check=False)
    assert told.status == 125
    assert "root" in told.stderr


def test_a_hop_in_doubt_that_did_succeed_keeps_its_guest(desk: Desk) -> None:
    """node3 runs it, but could not say so: home must not take it for lost when node2's keeper leaves."""
    shell, pid = counter(desk)
    desk.move(pid, "node2")
    with held(desk.nodes, "node3", "destination-recorded") as holder:
        client = start_move(desk, pid, "node3")
        await_reached(holder, client)
        desk.nodes.cut("node3")
        let_go(holder)
        complaint(client)
        again = desk.migrate("-p", str(pid), "-h", "node1")
        assert f"pid {pid}: its move to node3 is in doubt" in again.stderr
        desk.nodes.heal("node3")
    until(lambda: guests_at(desk.nodes, "node3") == {pid}, "it is on node3", LONG_SECONDS)
    until(lambda: not guests_at(desk.nodes, "node2"), "node2 has let go of it", LONG_SECONDS)
    desk.grows("out")
    desk.move(pid, "node1")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_guest_is_not_lost_with_the_keeper_that_it_has_left(desk: Desk) -> None:
    """Home hears from its new keeper only long after the old one has ended."""
    shell, pid = counter(desk)
    desk.move(pid, "node2")
    with held(desk.nodes, "node3", "destination-resumed") as holder:
        client = start_move(desk, pid, "node3")
        await_reached(holder, client)
        assert client.wait(LONG_SECONDS) == 0
        until(lambda: not agent_pids(desk.nodes, "node2", "keeper"), "node2 is rid of it")
        let_go(holder)
    desk.grows("out")
    desk.move(pid, desk.home)
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken
