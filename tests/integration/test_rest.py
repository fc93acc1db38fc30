"""Background processes that a guest leaves behind live on when it ends, as they would at home."""

import pytest
from moving import Desk, guest_pids, guests_at, until

# The background process prints into the shell's pipe and appends to a file of home's.
LEAVER = """\
while [ ! -e enough ]; do
    n=$((n+1)); echo "left $n"; echo "left $n" >>log; sleep 0.02
done &
while [ ! -e end ]; do sleep 0.02; done
exit 3
"""
ROUTES = {"away": ["node2"], "two hops": ["node2", "node3"], "home again": ["node2", "node1"]}


def leave(desk: Desk, route: str) -> tuple[int, str]:
    """A guest with a background process at the end of a route. :return: its pid and where it is."""
    desk.write("leaver.sh", LEAVER)
    shell = desk.shell(
        '{ sh leaver.sh & echo "pid $!" >&3; wait $!; echo "status $?" >&3; } 3>told | cat >out'
    )
    assert shell is desk.shells[-1]
    pid = int(until(lambda: desk.read("told"), "the pid is told").split()[1])
    desk.grows("log", 3)
    for host in ROUTES[route]:
        desk.move(pid, host)
    return pid, ROUTES[route][-1]


def status(desk: Desk) -> int:
    """What the shell got for the guest."""
    found = until(lambda: desk.read("told").splitlines()[1:], "the shell has got a status")
    return int(found[0].split()[1])


@pytest.mark.parametrize("route", ROUTES)
def test_it_works_on_and_its_output_comes_home(desk: Desk, route: str) -> None:
    pid, host = leave(desk, route)
    desk.write("end")
    assert status(desk) == 3
    until(lambda: not desk.state(pid), "the deputy has ended")
    assert guests_at(desk.nodes, host) == {pid}
    desk.grows("log", 5)
    desk.grows("out", 5)
    rows = desk.nodes.exec("node1", ["migctl", "ps"], user="alice").stdout.splitlines()
    assert [row.split("\t")[6] for row in rows if row.startswith(f"{pid:#x}\t")] == ["rest"]
    desk.enough()
    assert desk.shells[-1].rest() == []  # its pipeline has ended: nobody holds the pipe any more
    assert desk.read("out") == desk.read("log")
    until(lambda: not guests_at(desk.nodes, host), "nothing of it is left")


def test_a_killed_guest_leaves_its_background_process(desk: Desk) -> None:
    pid, host = leave(desk, "away")
    desk.send(pid, "KILL")
    assert status(desk) == 128 + 9
    desk.grows("log", 5)
    assert guest_pids(desk.nodes, host, pid)
    desk.enough()
    until(lambda: not guests_at(desk.nodes, host), "nothing of it is left")


def test_what_is_left_does_not_move(desk: Desk) -> None:
    pid, host = leave(desk, "away")
    desk.write("end")
    assert status(desk) == 3
    until(lambda: not desk.state(pid), "the deputy has ended")
    told = desk.migrate("-p", str(pid), "-h", "node3")
    assert told.status == 125
    assert "no such process" in told.stderr
    desk.grows("log", 5)
    desk.enough()
    until(lambda: not guests_at(desk.nodes, host), "nothing of it is left")


def test_what_is_left_survives_a_cut(desk: Desk) -> None:
    _, host = leave(desk, "away")
    desk.write("end")
    assert status(desk) == 3
    desk.nodes.cut(host)
    desk.nodes.heal(host)
    desk.grows("log", 5)
    desk.enough()
    until(lambda: not guests_at(desk.nodes, host), "nothing of it is left")
