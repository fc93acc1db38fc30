"""Daemons are restarted, processes killed, networks cut while a guest is away: it goes on, or ends as a whole."""

import pytest
from moving import Desk, Shell, agent_pids, guests_at, told_to_freeze, until

OUTPUTS = {"a file": ">out", "a pipe": "> >(cat >out)"}


def guest(desk: Desk, output: str = "a file") -> tuple[Shell, int]:
    """A program that counts, and does so on node2 by now."""
    shell, pid = desk.job(f"python3 counter.py 7 {OUTPUTS[output]}")
    desk.grows("out")
    desk.move(pid, "node2")
    desk.grows("out")
    return shell, pid


def ends_well(desk: Desk, shell: Shell) -> None:
    """The program goes on, ends, its shell gets its status, and not a line is missing."""
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    until(lambda: desk.read("out").endswith("enough\n"), "the output is complete")
    counted = desk.count()
    assert counted.unbroken
    assert counted.words == ["enough"]
    assert len(counted.ids) == 1


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("how", ["restarted", "killed"])
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_guest_outlives_the_daemon(desk: Desk, node: str, how: str, output: str) -> None:
    shell, pid = guest(desk, output)
    if how == "restarted":
        desk.nodes.restart_migd(node)
    else:
        desk.nodes.crash_migd(node)
    desk.grows("out")
    assert guests_at(desk.nodes, "node2") == {pid}
    ends_well(desk, shell)


def test_a_guest_outlives_the_daemons_of_both_hosts_at_once(desk: Desk) -> None:
    shell, _ = guest(desk)
    desk.nodes.crash_migd("node1")
    desk.nodes.crash_migd("node2")
    ends_well(desk, shell)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_guest_moves_on_after_a_restart_of_the_daemon(desk: Desk, node: str) -> None:
    shell, pid = guest(desk)
    desk.nodes.crash_migd(node)
    desk.move(pid, "node3")
    desk.grows("out")
    desk.move(pid, "node1")
    ends_well(desk, shell)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_guest_may_end_while_there_is_no_daemon(desk: Desk, node: str) -> None:
    shell, _ = guest(desk)
    desk.nodes.node(node).stop_service("migd")
    try:
        ends_well(desk, shell)
    finally:
        desk.nodes.node(node).start_service("migd")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_nothing_is_lost_when_the_network_is_cut_and_heals(
    desk: Desk, node: str, output: str
) -> None:
    shell, pid = guest(desk, output)
    desk.nodes.cut(node)
    # Time for connections to be seen dead, and for a program that knows nothing of it to go on.
    desk.nodes.sh("node3", "timeout 6 ping -c 100 -i 0.2 node2 || true")
    assert guests_at(desk.nodes, "node2") == {pid}
    desk.nodes.heal(node)
    ends_well(desk, shell)


def test_a_process_moves_right_after_a_cut_has_healed(desk: Desk) -> None:
    """The hosts' connections are dead by then, which only shows when they are used."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.nodes.cut("node2")
    desk.nodes.sh("node3", "timeout 6 ping -c 100 -i 0.2 node2 || true")
    desk.nodes.heal("node2")
    desk.move(pid, "node2")
    ends_well(desk, shell)


def test_a_process_moves_right_after_its_destination_has_restarted(desk: Desk) -> None:
    """All connections with it are dead, and nobody has said so: it was switched off."""
    shell, pid = guest(desk)
    desk.move(pid, "node1")
    desk.nodes.kill("node2")
    desk.nodes.boot("node2")
    desk.move(pid, "node2")
    ends_well(desk, shell)


def test_a_guest_that_was_killed_at_home_during_a_cut_dies_when_it_heals(desk: Desk) -> None:
    shell, pid = guest(desk)
    desk.nodes.cut("node2")
    desk.send(pid, "KILL")
    assert shell.status() == 128 + 9
    desk.nodes.heal("node2")
    until(lambda: not guests_at(desk.nodes, "node2"), "the guest is dead", 60)


def test_a_guest_that_is_cut_off_for_long_stands_still_until_home_is_back(desk: Desk) -> None:
    """Longer than `cut_freeze_seconds` (20), shorter than `lost_seconds` (60)."""
    shell, pid = guest(desk)
    desk.nodes.cut("node2")
    until(lambda: told_to_freeze(desk.nodes, "node2", pid), "the guest is frozen", 60)
    desk.nodes.heal("node2")
    until(lambda: not told_to_freeze(desk.nodes, "node2", pid), "the guest runs again", 60)
    ends_well(desk, shell)


def test_a_guest_whose_host_dies_is_lost_and_its_shell_is_told(desk: Desk) -> None:
    shell, _ = guest(desk)
    desk.nodes.kill("node2")
    desk.nodes.boot("node2")
    assert int(shell.line(120).split()[1]) == 128 + 9
    assert desk.count().unbroken


def test_a_guest_ends_when_its_home_has_restarted(desk: Desk) -> None:
    guest(desk)
    desk.nodes.kill("node1")
    desk.nodes.boot("node1")
    until(lambda: not guests_at(desk.nodes, "node2"), "the guest has been ended", 120)
    assert desk.count().unbroken


@pytest.mark.parametrize(("node", "role"), [("node1", "guard"), ("node2", "keeper")])
def test_without_its_guard_or_its_keeper_a_guest_ends_at_both_hosts(
    desk: Desk, node: str, role: str
) -> None:
    shell, pid = guest(desk)
    for agent in agent_pids(desk.nodes, node, role):
        desk.nodes.exec(node, ["kill", "-KILL", str(agent)], check=False)
    until(lambda: not guests_at(desk.nodes, "node2"), "the guest is dead", 120)
    assert int(shell.line(120).split()[1]) == 128 + 9
    until(lambda: not desk.state(pid), "its deputy has gone")
    assert desk.count().unbroken


def test_a_deputy_that_is_killed_leaves_no_zombie_of_its_guest(desk: Desk) -> None:
    shell, pid = guest(desk)
    desk.send(pid, "KILL")
    assert shell.status() == 128 + 9
    until(lambda: not guests_at(desk.nodes, "node2"), "the guest is dead")
