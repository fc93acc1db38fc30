"""Signals and job control reach a guest through its deputy; its parent sees what it would see at home."""

import signal

import pytest
from moving import Desk, guest_pids, guests_at, process_state, until

ROUTES = {
    "one hop": ["node2"],
    "two hops": ["node2", "node3"],
    "there and home": ["node2", "node1"],
}


def go(desk: Desk, pid: int, route: str) -> None:
    """Along a route, with some output on each host."""
    for host in ROUTES[route]:
        desk.grows("out")
        desk.move(pid, host)
    desk.grows("out")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["TERM", "KILL", "INT", "HUP"])
def test_a_signal_that_kills_the_deputys_pid_kills_the_guest_and_the_shell_is_told(
    desk: Desk, name: str, route: str
) -> None:
    # A shell without job control lets its background jobs ignore SIGINT: so with it.
    shell = desk.shell(
        'set -m; python3 -c "import signal; signal.signal(2, signal.SIG_DFL);'
        " exec(open('counter.py').read())\" 7 >out &\n"
        'echo "pid $!"; wait $!; echo "status $?"'
    )
    pid = shell.pid()
    go(desk, pid, route)
    desk.send(pid, name)
    assert shell.status() == 128 + signal.Signals[f"SIG{name}"]
    until(lambda: not guests_at(desk.nodes, ROUTES[route][-1]), "the guest is dead")
    counted = desk.count()
    assert counted.unbroken
    assert counted.words == []


@pytest.mark.parametrize("route", ROUTES)
def test_a_signal_that_the_guest_handles_reaches_it(desk: Desk, route: str) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    go(desk, pid, route)
    desk.send(pid, "USR1")
    until(lambda: "signal 10" in desk.count().words, "SIGUSR1 was handled")
    desk.send(pid, "USR2")
    until(lambda: "signal 12" in desk.count().words, "SIGUSR2 was handled")
    desk.enough()
    assert shell.status() == 7
    counted = desk.count()
    assert counted.unbroken
    assert counted.words == ["signal 10", "signal 12", "enough"]


def test_signals_that_were_pending_when_it_moved_arrive_once(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.send(pid, "STOP")
    until(lambda: desk.state(pid) == "T", "it is stopped")
    desk.send(pid, "USR1")
    desk.send(pid, "USR2")
    moved = desk.migrate("-p", str(pid), "-h", "node2")
    assert moved.status == 0, moved.stderr
    desk.send(pid, "CONT")
    until(lambda: len(desk.count().words) >= 2, "both signals were handled")
    desk.enough()
    assert shell.status() == 7
    assert sorted(desk.count().words) == ["enough", "signal 10", "signal 12"]


@pytest.mark.parametrize("name", ["STOP", "TSTP"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_guest_stops_and_goes_on_with_its_deputy(desk: Desk, route: str, name: str) -> None:
    """The shell sees its job stopped, as `wait` and `jobs` tell."""
    shell = desk.shell(
        "set -m; python3 counter.py 7 >out &\n"
        'mkfifo go; echo "pid $!"; wait %1; echo "seen $?"; jobs %1\n'
        'read line <go; kill -CONT %1; wait %1; echo "status $?"'
    )
    pid = shell.pid()
    go(desk, pid, route)
    desk.send(pid, name)
    until(lambda: desk.state(pid) == "T", "the deputy is stopped")
    where = ROUTES[route][-1]
    (there,) = guest_pids(desk.nodes, where, pid)
    until(lambda: process_state(desk.nodes, where, there) == "T", "the guest is stopped")
    lines = desk.lines("out")
    assert shell.says("seen") == [str(128 + signal.Signals[f"SIG{name}"])]
    assert shell.line().split()[:2] == ["[1]+", "Stopped"]
    assert desk.lines("out") == lines
    desk.tell("go")
    desk.grows("out")
    assert process_state(desk.nodes, where, there) != "T"
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_guest_that_stops_itself_stops_its_deputy(desk: Desk) -> None:
    shell = desk.shell(
        "set -m; python3 counter.py 7 >out &\n"
        'mkfifo go; echo "pid $!"; wait %1; echo "seen $?"\n'
        'read line <go; wait %1; echo "status $?"'
    )
    pid = shell.pid()
    go(desk, pid, "one hop")
    (there,) = guest_pids(desk.nodes, "node2", pid)
    desk.nodes.exec("node2", ["kill", "-STOP", str(there)], user="alice")
    until(lambda: desk.state(pid) == "T", "the deputy is stopped")
    assert shell.says("seen") == [str(128 + signal.SIGSTOP)]
    desk.send(pid, "CONT")
    desk.tell("go")
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7


def test_a_guest_that_dies_of_a_signal_where_it_runs_does_so_at_home(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    go(desk, pid, "one hop")
    (there,) = guest_pids(desk.nodes, "node2", pid)
    desk.nodes.exec("node2", ["kill", "-SEGV", str(there)], user="alice")
    assert shell.status() == 128 + signal.SIGSEGV


def test_a_stopped_process_moves_stopped(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.send(pid, "STOP")
    until(lambda: desk.state(pid) == "T", "it is stopped")
    moved = desk.migrate("-p", str(pid), "-h", "node2")
    assert moved.status == 0, moved.stderr
    (there,) = guest_pids(desk.nodes, "node2", pid)
    until(lambda: process_state(desk.nodes, "node2", there) == "T", "the guest is stopped")
    until(lambda: desk.state(pid) == "T", "the deputy is stopped")
    desk.send(pid, "CONT")
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_signal_to_its_group_reaches_the_guest_once(desk: Desk) -> None:
    shell = desk.shell(
        'set -m; python3 counter.py 7 >out &\necho "pid $!"; wait %1; echo "status $?"'
    )
    pid = shell.pid()
    go(desk, pid, "one hop")
    desk.nodes.exec("node1", ["kill", "-USR1", "--", f"-{pid}"], user="alice")
    until(lambda: desk.count().words, "it was handled")
    desk.grows("out")
    desk.enough()
    until(lambda: desk.read("out").endswith("enough\n"), "it ends")
    assert desk.count().words == ["signal 10", "enough"]
    assert shell.status() == 7
