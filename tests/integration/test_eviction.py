"""Guests leave when the owner of their host wants it back: frozen at once, and home."""

import re
from collections.abc import Iterator

import pytest
from holding import await_reached, held, let_go
from moving import Desk, Shell, guests_at, told_to_freeze, until
from testbed.client import Nodes


@pytest.fixture(autouse=True)
def owner_has_gone(nodes: Nodes) -> Iterator[None]:
    """After each test node2 takes guests again, which it would not for a while."""
    yield
    nodes.restart_migd("node2")


@pytest.fixture
def guest(desk: Desk) -> tuple[Shell, int]:
    """A job of alice's on node2, with home on node1."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    desk.grows("out")
    return shell, pid


def is_home(nodes: Nodes, pid: int) -> bool:
    """Whether a guest of node1 runs there, and nowhere else."""
    return guests_at(nodes, "node1") == {pid} and not guests_at(nodes, "node2")


def listed(nodes: Nodes, node: str) -> str:
    return nodes.exec(node, ["migctl", "ps"]).stdout


def runs_on(desk: Desk, shell: Shell, status: int = 7) -> None:
    """What was evicted goes on as if nothing had happened, and comes to its end."""
    desk.grows("out")
    desk.enough()
    assert shell.status() == status
    assert desk.count().unbroken


def test_evict_sends_a_guest_home(desk: Desk, nodes: Nodes, guest: tuple[Shell, int]) -> None:
    shell, pid = guest
    assert nodes.exec("node2", ["evict"]).stdout == "Evicted 1 foreign process.\n"
    until(lambda: is_home(nodes, pid), "the guest is home")
    runs_on(desk, shell)
    log = nodes.logs("node2")
    assert re.search(rf"evicted {pid:#x} \(python3 counter.py 7\) of alice on node1: root", log)


def test_three_guests_at_once(desk: Desk, nodes: Nodes) -> None:
    jobs = [desk.job(f"python3 counter.py {n} >out{n}") for n in range(3)]
    for n, (_, pid) in enumerate(jobs):
        desk.grows(f"out{n}")
        desk.migrate("-p", str(pid), "-h", "node2", check=True)
    assert nodes.exec("node2", ["evict"]).stdout == "Evicted 3 foreign processes.\n"
    until(lambda: not guests_at(nodes, "node2"), "all have left")
    assert guests_at(nodes, "node1") == {pid for _, pid in jobs}
    for n in range(3):
        desk.grows(f"out{n}")
    desk.enough()
    assert [shell.status() for shell, _ in jobs] == [0, 1, 2]
    assert all(desk.count(f"out{n}").unbroken for n in range(3))


def test_a_guest_whose_home_is_cut_off_waits_frozen_until_it_is_back(
    desk: Desk, nodes: Nodes, guest: tuple[Shell, int]
) -> None:
    shell, pid = guest
    nodes.cut("node1")
    assert nodes.exec("node2", ["evict"]).stdout == "Evicted 1 foreign process.\n"
    until(lambda: told_to_freeze(nodes, "node2", pid), "the guest is frozen")
    until(
        lambda: f"{pid:#x} (python3 counter.py 7) of alice on node1 waits" in nodes.logs("node2"),
        "migd has found that home is cut off",
        60,
    )
    # The next migd knows that it is to go.
    nodes.crash_migd("node2")
    assert told_to_freeze(nodes, "node2", pid)
    until(lambda: f"{pid:#x}\talice" in listed(nodes, "node2"), "migctl ps lists it")
    assert "\tnormal\tevicted: root asked for it\tpython3 counter.py 7" in listed(nodes, "node2")
    nodes.heal("node1")
    until(lambda: is_home(nodes, pid), "the guest is home", 60)
    runs_on(desk, shell)


def test_expel_empties_a_host_for_good(desk: Desk, nodes: Nodes, guest: tuple[Shell, int]) -> None:
    shell, pid = guest
    told = nodes.exec("node2", ["migctl", "expel"], user="alice", check=False)
    assert told.status != 0 and "only root and its owners" in told.stderr
    told = nodes.exec("node2", ["migctl", "expel", "--wait", "--reason", "repairs"])
    try:
        assert told.stdout == "Evicted 1 foreign process.\n"
        assert is_home(nodes, pid)
        assert "repairs" in desk.migrate("-p", str(pid), "-h", "node2").stderr
    finally:
        nodes.exec("node2", ["migctl", "bring"])
    desk.move(pid, "node2")
    runs_on(desk, shell)


def test_a_command_is_evicted_as_well(desk: Desk, nodes: Nodes) -> None:
    shell, pid = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out")
    desk.grows("out")
    assert nodes.exec("node2", ["evict"]).stdout == "Evicted 1 foreign process.\n"
    until(lambda: is_home(nodes, pid), "the guest is home")
    runs_on(desk, shell)


@pytest.mark.parametrize(
    ("point", "node", "hosts", "ends_up"),
    [
        ("destination-received", "node2", ["node2"], "node1"),
        ("destination-commit", "node2", ["node2"], "node1"),
        ("source-frozen", "node2", ["node2", "node3"], "node3"),
    ],
    ids=["while it arrives", "as it is committed", "while it goes on"],
)
def test_an_eviction_in_the_middle_of_a_move(
    desk: Desk, nodes: Nodes, point: str, node: str, hosts: list[str], ends_up: str
) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    for host in hosts[:-1]:
        desk.move(pid, host)
    with held(nodes, node, point) as holder:
        command = ["migrate", "-p", str(pid), "-h", hosts[-1]]
        mover = nodes.popen("node1", command, user="alice")
        await_reached(holder, mover)
        assert nodes.exec("node2", ["evict"]).stdout == "Evicted 1 foreign process.\n"
        let_go(holder)
        _, told = mover.communicate(timeout=60)
    refused = point == "destination-received"
    assert (mover.returncode != 0) is refused, told
    assert (b"takes no guests now: root asked for it" in told) is refused
    until(lambda: not guests_at(nodes, "node2"), "node2 is rid of it")
    # What never left is no guest of its own home's.
    assert guests_at(nodes, ends_up) == (set() if refused else {pid})
    runs_on(desk, shell)
