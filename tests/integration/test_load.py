"""The load database: every host is known, an idle one is chosen, claims end, another host takes over."""

import ast
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from moving import Desk, guests_at, until
from testbed.client import Nodes

CLIENT = """\
import select, sys
from migrate import mig
m = mig.Mig()
told = []
def ready(seconds):
    return bool(select.select([m], [], [], seconds)[0])
def error(function, *words):
    try:
        function(*words)
    except mig.MigrateError as error:
        return type(error).__name__
for line in sys.stdin:
    print(repr(eval(line)), flush=True)
"""


def hosts(nodes: Nodes, node: str = "node1") -> dict[str, dict[str, object]]:
    """What `rup` says on a node."""
    told = nodes.exec(node, ["rup", "--json"], user="alice")
    return {host["name"]: host for host in json.loads(told.stdout)}


def states(nodes: Nodes, node: str = "node1") -> dict[str, object]:
    return {name: host["state"] for name, host in hosts(nodes, node).items()}


def central(nodes: Nodes, node: str = "node1") -> str:
    """The host that leads, as a node's migd knows it."""
    script = "from migrate import mig; print(mig.get_stats().central)"
    return nodes.exec(node, ["/opt/migrate/bin/python", "-c", script], user="alice").stdout.strip()


def all_up(nodes: Nodes) -> bool:
    return "DOWN" not in states(nodes).values() and len(states(nodes)) == 3


@pytest.fixture(autouse=True)
def known(nodes: Nodes) -> Iterator[None]:
    """Before each test all hosts are known to the central daemon, and idle."""
    until(lambda: all_up(nodes), "all hosts have reported")
    until(lambda: set(states(nodes).values()) == {"IDLE"}, "all hosts are idle", 60)
    yield


def test_every_host_knows_the_same_table(nodes: Nodes) -> None:
    for node in nodes.names:
        assert set(states(nodes, node)) == {"node1", "node2", "node3"}
        assert central(nodes, node) == central(nodes)


def test_the_table_has_sprites_columns(nodes: Nodes) -> None:
    lines = nodes.exec("node1", ["rup"], user="alice").stdout.splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        host, kind, status, mig, loads, idle, guests = line.split("\t")
        assert (host, kind, mig, guests) == (f"node{number}", "x86_64", "yes", "-")
        assert status in ("IDLE", "PART_USED", "FULL")
        assert re.fullmatch(r"(\d+\.\d\d ?){3}", loads)
        assert re.fullmatch(r"\d+s|(\d+\+)?\d+:\d\d", idle)


def test_a_guest_shows_and_its_host_is_free_again_when_it_has_ended(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 5 >out")
    desk.grows("out")
    desk.migrate("-p", str(pid), check=True)
    (where,) = [node for node in ("node2", "node3") if guests_at(desk.nodes, node) == {pid}]

    def guests() -> object:
        return hosts(desk.nodes)[where]["guests"]

    until(guests, "the table shows the guest")
    (guest,) = hosts(desk.nodes)[where]["guests"]  # type: ignore[misc]
    assert (guest["user"], guest["home"], guest["count"]) == ("alice", "node1", 1)
    assert hosts(desk.nodes)[where]["claims"] == 0
    desk.enough()
    assert shell.status() == 5
    until(lambda: not guests(), "the guest has gone from the table")
    assert states(desk.nodes)[where] == "IDLE"


# ---------------------------------------------------------------------- clients


PYTHON = "/opt/migrate/bin/python"


class Client:
    """A program of a user's on a node that uses the Mig library, and does what it is told."""

    def __init__(self, nodes: Nodes, node: str, user: str = "alice") -> None:
        self._process = nodes.popen(
            node, [PYTHON, "-c", CLIENT], user=user, stdin=subprocess.PIPE, stderr=None
        )

    def do(self, expression: str) -> object:
        """The value of an expression of its, in which m is a Mig."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(expression.encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the client died of {expression}"
        return ast.literal_eval(line.decode())

    def hosts(self, count: int = 1, words: str = "") -> list[str]:
        """Hosts that it asks for."""
        got = self.do(f"m.request_idle_hosts({count}{words})")
        assert isinstance(got, list)
        return got

    def close(self) -> None:
        """Let it end, as any program does."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait(30)

    def kill(self) -> None:
        """End it at once."""
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def client(nodes: Nodes) -> Iterator[Callable[..., Client]]:
    """Makes clients that end with the test."""
    made: list[Client] = []

    def make(node: str = "node1", user: str = "alice") -> Client:
        made.append(Client(nodes, node, user))
        return made[-1]

    yield make
    for one in made:
        one.close()


def claims(nodes: Nodes, node: str = "node1") -> dict[str, object]:
    return {name: host["claims"] for name, host in hosts(nodes, node).items()}


def free(nodes: Nodes, node: str = "node1") -> bool:
    """Whether nobody has a claim on anything."""
    return set(claims(nodes, node).values()) == {0}


def test_what_a_client_holds_is_marked_and_free_again_when_it_ends(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    until(lambda: free(nodes), "all hosts are free")
    one = client()
    assert sorted(one.hosts(2)) == ["node2", "node3"]
    assert claims(nodes) == {"node1": 0, "node2": 1, "node3": 1}
    assert one.do("m.confirm_idle('node2')") is True
    assert one.do("m.return_hosts(['node2'])") == 1
    assert one.do("m.confirm_idle('node2')") is False
    one.kill()
    until(lambda: free(nodes), "what it held is free")


def test_a_client_on_another_host_that_is_switched_off_loses_its_claims(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    away = next(node for node in ("node2", "node3") if node != central(nodes))
    one = client(away)
    assert one.hosts(1)
    assert not free(nodes)
    nodes.kill(away)
    until(lambda: free(nodes), "what it held is free", 60)


def test_every_function_of_the_library(nodes: Nodes, client: Callable[..., Client]) -> None:
    one = client()
    assert one.do("m.get_info().name") == "node1"
    assert one.do("m.get_info('node2').id") == one.do("m.get_info(2).id") == 2
    assert one.do("[h.name for h in m.get_all_info()]") == ["node1", "node2", "node3"]
    number = one.do("m.get_idle_node()")
    assert number in (2, 3)
    assert one.do("[claim.host for claim in m.held]") == [f"node{number}"]
    assert one.do(f"m.done({number})") == 1
    assert one.do("m.held") == ()
    assert one.do("m.get_stats().hosts") == 3
    assert one.do("mig.get_pdev_name()") == "/run/migrate/load.sock"
    assert one.do("error(m.get_info, 'nowhere')") == "UserError"
    assert one.do("error(m.delete_host, 'node2')") == "UserError"
    assert one.do("error(m.evict)") == "UserError"
    assert one.do("error(m.request_idle_hosts, 1, 1, 64)") == "UserError"
    assert one.do("error(m.request_idle_hosts, 0)") == "UserError"
    assert one.do("m.confirm_idle('nowhere')") is False


def test_who_found_no_host_is_told_when_there_is_one(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    one, other = client(), client(user="bob")
    until(lambda: free(nodes), "all hosts are free")
    slots = 2 * hosts(nodes)["node2"]["slots"]  # type: ignore[operator]
    held = one.hosts(slots)
    assert len(held) == slots
    assert other.hosts(1, ", callback=lambda: told.append(1)") == []
    assert other.do("ready(0)") is False
    one.do(f"m.return_hosts(['{held[0]}'])")
    assert other.do("ready(30)") is True
    while other.do("told or [str(type(e)) for e in m.events()]") != [1]:
        assert other.do("ready(30)") is True
    assert other.hosts(1) == [held[0]]


def test_who_holds_many_is_asked_to_give_one_to_who_has_none(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    one, other = client(), client(user="bob")
    until(lambda: free(nodes), "all hosts are free")
    one.hosts(2 * hosts(nodes)["node2"]["slots"])  # type: ignore[operator]
    assert other.hosts(1, ", callback=lambda: told.append(1)") == []
    assert one.do("ready(30)") is True
    (host,) = one.do("[e.host for e in m.events() if isinstance(e, mig.GiveBack)]")  # type: ignore[misc]
    one.do(f"m.return_hosts(['{host}'])")
    assert other.do("ready(30)") is True
    assert other.hosts(1) == [host]


# ---------------------------------------------------------------------- the hosts' own word


@pytest.fixture
def quiet(nodes: Nodes) -> Iterator[Callable[[str, str], None]]:
    """Sprite's thresholds on all nodes, and a function that sets a node's load averages."""
    for node in nodes.names:
        nodes.sh(node, "echo 0.00 0.00 0.00 1/9 9 >/run/load; mount --bind /run/load /proc/loadavg")
        nodes.exec(node, ["migctl", "set", "load_accept=.75,1,1.5", "load_stop=2.5,2.75,3"])
    processors = os.cpu_count() or 1

    def set_load(node: str, each: str) -> None:
        loads = [float(word) * processors for word in each.split()]
        text = " ".join(f"{load:.2f}" for load in loads)
        nodes.sh(node, 'echo "$1 1/9 9" >/run/load', text)

    until(lambda: set(states(nodes).values()) == {"IDLE"}, "all hosts are idle")
    yield set_load
    for node in nodes.names:
        nodes.sh(node, "umount /proc/loadavg || true")
        nodes.restart_migd(node)


def becomes(nodes: Nodes, node: str, state: str) -> None:
    until(lambda: states(nodes)[node] == state, f"{node} is {state}")


def test_a_host_closes_and_opens_by_its_load_with_hysteresis(
    nodes: Nodes, quiet: Callable[[str, str], None], desk: Desk
) -> None:
    quiet("node2", "2.4 2.6 2.9")
    quiet("node3", "2.6 0 0")
    becomes(nodes, "node3", "ACTIVE")
    assert states(nodes)["node2"] == "IDLE"
    assert "load of 1 min" in str(hosts(nodes)["node3"]["reason"])
    # The only one left is chosen.
    shell, pid = desk.job("python3 counter.py 0 >out")
    desk.grows("out")
    desk.migrate("-p", str(pid), check=True)
    assert guests_at(nodes, "node2") == {pid}
    quiet("node3", "0.9 0 0")
    quiet("node2", "0 0 3.1")
    becomes(nodes, "node2", "ACTIVE")
    # Who was welcome is so no longer.
    until(lambda: not guests_at(nodes, "node2"), "the guest has left")
    assert guests_at(nodes, "node1") == {pid}
    desk.enough()
    assert shell.status() == 0
    assert states(nodes)["node3"] == "ACTIVE", "it opens only below .75"
    quiet("node3", "0.7 0 0")
    becomes(nodes, "node3", "IDLE")


def test_input_at_a_terminal_makes_a_host_active_and_sends_guests_home(
    nodes: Nodes, desk: Desk
) -> None:
    terminal = nodes.popen("node2", ["sh", "-c", "tty; cat"], tty=True, stdin=subprocess.PIPE)
    assert terminal.stdout is not None
    name = terminal.stdout.readline().decode().strip()
    try:
        becomes(nodes, "node2", "ACTIVE")
        nodes.exec("node2", ["touch", "-a", "-d", "1 hour ago", name])
        becomes(nodes, "node2", "IDLE")
        idle = hosts(nodes)["node2"]["idle_seconds"]
        assert isinstance(idle, float) and idle > 3000
        shell, pid = desk.job("python3 counter.py 0 >out")
        desk.grows("out")
        desk.move(pid, "node2")
        nodes.exec("node2", ["touch", "-a", name])
        becomes(nodes, "node2", "ACTIVE")
        until(lambda: not guests_at(nodes, "node2"), "the guest has left")
        assert guests_at(nodes, "node1") == {pid}
        desk.enough()
        assert shell.status() == 0
    finally:
        terminal.terminate()
        terminal.wait(30)


def test_a_blocked_host_takes_no_guests_at_all_until_it_is_brought_back(
    desk: Desk, nodes: Nodes
) -> None:
    told = nodes.exec("node2", ["migctl", "block"], user="alice", check=False)
    assert told.status != 0 and "only root and its owners" in told.stderr
    nodes.exec("node2", ["migctl", "block", "--reason", "backup tonight"])
    try:
        becomes(nodes, "node2", "REFUSES")
        nodes.restart_migd("node2")
        until(lambda: all_up(nodes), "all hosts have reported")
        assert states(nodes)["node2"] == "REFUSES"
        shell, pid = desk.job("python3 counter.py 0 >out")
        desk.grows("out")
        assert "backup tonight" in desk.migrate("-p", str(pid), "-h", "node2").stderr
        desk.migrate("-p", str(pid), check=True)
        assert guests_at(nodes, "node3") == {pid}
        desk.enough()
        assert shell.status() == 0
    finally:
        nodes.exec("node2", ["migctl", "bring"])
    becomes(nodes, "node2", "IDLE")


def test_a_full_host_refuses_what_was_not_sent_there_by_name(desk: Desk, nodes: Nodes) -> None:
    for node in ("node2", "node3"):
        nodes.exec(node, ["migctl", "set", "guest_slots=1"])
    try:
        jobs = [desk.job(f"python3 counter.py {n} >out{n}") for n in range(3)]
        for n in range(3):
            desk.grows(f"out{n}")
        for _, pid in jobs[:2]:
            desk.migrate("-p", str(pid), check=True)
        assert {len(guests_at(nodes, node)) for node in ("node2", "node3")} == {1}
        told = desk.migrate("-p", str(jobs[2][1]))
        assert told.status != 0 and "no other host is idle" in told.stderr
        desk.migrate("-p", str(jobs[2][1]), "-h", "node2", check=True)
        desk.enough()
        assert [shell.status() for shell, _ in jobs] == [0, 1, 2]
    finally:
        for node in ("node2", "node3"):
            nodes.exec(node, ["migctl", "set", "guest_slots=0"])


# ---------------------------------------------------------------------- another takes over


def migd_pid(nodes: Nodes, node: str) -> str:
    return nodes.sh(node, "pgrep -o -f bin/migd")


@contextmanager
def lost(nodes: Nodes, leader: str, how: str) -> Iterator[None]:
    """The central daemon is lost to the others until the block ends."""
    pid = migd_pid(nodes, leader)
    match how:
        case "killed":
            nodes.node(leader).stop_service("migd")
        case "hung":
            nodes.exec(leader, ["kill", "-STOP", pid])
        case _:
            nodes.cut(leader)
    try:
        yield
    finally:
        match how:
            case "killed":
                nodes.node(leader).start_service("migd")
            case "hung":
                nodes.exec(leader, ["kill", "-CONT", pid])
            case _:
                nodes.heal(leader)


@pytest.mark.parametrize("how", ["killed", "hung", "cut off"])
def test_when_the_central_daemon_is_lost_another_takes_over(
    nodes: Nodes, client: Callable[..., Client], how: str
) -> None:
    leader = central(nodes)
    here, there = (node for node in nodes.names if node != leader)
    term = stats(nodes, here, "term")
    one = client(here)
    until(lambda: free(nodes, here), "all hosts are free")
    assert there in one.hosts(2)
    one.do(f"m.return_hosts(['{leader}'])")
    with lost(nodes, leader, how):
        until(lambda: central(nodes, here) in (here, there), "another leads")
        until(lambda: central(nodes, there) == central(nodes, here), "all follow it")
        assert stats(nodes, here, "term") > term
        assert one.do(f"m.confirm_idle('{there}')") is True, "what was held is held"
        until(lambda: claims(nodes, here)[there] == 1, "the new one knows that")
        one.do("m.return_hosts()")
        assert one.hosts(1), "it works on"
    # The old one steps down.
    until(lambda: central(nodes, leader) in (here, there), "the old one follows", 60)
    until(lambda: all_up(nodes), "all hosts are known again", 60)


@pytest.mark.parametrize("how", ["hung", "cut off"])
def test_an_eviction_needs_no_central_daemon(nodes: Nodes, how: str) -> None:
    leader = central(nodes)
    home, host = (node for node in nodes.names if node != leader)
    desk = Desk(nodes, f"evicted{how[0]}", home=home)
    desk.set_up()
    try:
        shell, pid = desk.job("python3 counter.py 0 >out")
        desk.grows("out")
        desk.move(pid, host)
        with lost(nodes, leader, how):
            nodes.exec(host, ["evict"])
            until(lambda: not guests_at(nodes, host), "the guest has left", 60)
            assert guests_at(nodes, home) == {pid}
            desk.grows("out")
            desk.enough()
            assert shell.status() == 0
            assert desk.count().unbroken
    finally:
        nodes.restore()
        desk.remove()
        nodes.restart_migd(host)  # or it would be its owner's for a while


def stats(nodes: Nodes, node: str, name: str) -> int:
    script = f"from migrate import mig; print(mig.get_stats().{name})"
    return int(nodes.exec(node, [PYTHON, "-c", script], user="alice").stdout)


def test_a_client_gets_over_a_restart_of_its_own_migd(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    away = next(node for node in ("node2", "node3") if node != central(nodes))
    one = client(away)
    (held,) = one.hosts(1)
    nodes.crash_migd(away)
    assert one.do(f"m.confirm_idle('{held}')") is True
    until(lambda: claims(nodes)[held] == 1, "the central daemon knows that")


# ---------------------------------------------------------------------- bad input


HOSTILE = """\
import os, resource, socket
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect("/run/migrate/load.sock")
    return s
for junk in (b"\\xff" * 9, b"\\0\\0\\0\\1\\xc1", os.urandom(9999), b"\\0\\0\\0\\2\\x92\\x92" * 99):
    with connect() as s:
        s.sendall(junk)
open_ones = []
for number in range(10000):
    try:
        open_ones.append(connect())
    except OSError:
        break
print(len(open_ones))
"""


def test_ten_thousand_connections_and_nonsense_leave_others_unharmed(
    nodes: Nodes, client: Callable[..., Client]
) -> None:
    one = client()
    before, logged = migd_pid(nodes, "node1"), len(nodes.logs("node1"))
    count = int(nodes.exec("node1", [PYTHON, "-c", HOSTILE], user="bob").stdout)
    assert count > 1000
    assert one.hosts(1)
    assert migd_pid(nodes, "node1") == before
    assert "Traceback" not in nodes.logs("node1")[logged:]


def test_loadavg_shows_this_host_and_its_file_too(nodes: Nodes) -> None:
    told = nodes.exec("node2", ["loadavg", "--json"], user="alice").stdout
    (shown,) = json.loads(told)
    read = json.loads(nodes.exec("node2", ["cat", "/run/migrate/loadavg"], user="alice").stdout)
    assert shown["name"] == read["name"] == "node2"
    assert set(shown) == set(read)


def test_only_a_host_that_is_down_can_be_deleted_and_only_by_root(nodes: Nodes) -> None:
    for user, reason in (("alice", "only root"), ("root", "is up")):
        told = nodes.exec("node1", ["loadavg", "-Z", "node3"], user=user, check=False)
        assert told.status != 0 and reason in told.stderr


def test_evict_says_how_many_it_has_sent_away(nodes: Nodes) -> None:
    assert nodes.exec("node2", ["evict"]).stdout == "Evicted 0 foreign processes.\n"
    told = nodes.exec("node2", ["evict"], user="alice", check=False)
    assert told.status != 0 and "only root and its owners" in told.stderr
    assert states(nodes)["node2"] == "ACTIVE", "who says that is there"
    nodes.restart_migd("node2")


def test_log_and_top(desk: Desk, nodes: Nodes) -> None:
    shell, pid = desk.job("python3 counter.py 0 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    (line,) = nodes.exec("node1", ["migctl", "log", "-n", "1"], user="alice").stdout.splitlines()
    assert re.search(rf"RESUMED\s+→ node2\s+{pid:#x} alice  python3 counter.py 0", line)
    screen = nodes.exec("node1", ["migctl", "top", "-n", "1"], user="alice").stdout
    assert "is the central daemon" in screen and "node2\tx86_64" in screen
    desk.enough()
    assert shell.status() == 0
