"""A login at a host sends its guests home, by way of PAM; and no state of migd's can hold up a login."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moving import Desk, Shell, guests_at, until
from terminals import Terminal
from testbed.client import Nodes

PAM_FILES = "cd /etc/pam.d && for f in *; do echo == $f; cat $f; done"
HOOK = "/usr/local/lib/migrate/login-hook"


@pytest.fixture
def guest(desk: Desk) -> tuple[Shell, int]:
    """A job of alice's on node2, with home on node1."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    return shell, pid


@pytest.fixture(autouse=True)
def pam(nodes: Nodes) -> Iterator[None]:
    """node2 tells its migd of logins; input at its terminals sends nobody home."""
    before = nodes.sh("node2", PAM_FILES)
    nodes.exec("node2", ["migctl", "set", "idle_seconds=0"])
    nodes.exec("node2", ["migctl", "pam", "enable"])
    try:
        yield
    finally:
        nodes.exec("node2", ["migctl", "pam", "disable"])
        nodes.restart_migd("node2")
    assert nodes.sh("node2", PAM_FILES) == before


def log_in(nodes: Nodes, user: str = "bob") -> None:
    """Log in at a terminal of node2, run a command there, log out."""
    with Terminal(
        nodes.popen("node2", ["login", "-f", user], tty=True, stdin=subprocess.PIPE)
    ) as terminal:
        terminal.expect(rf"{user}@node2:~\$ ", 60)
        terminal.keys("echo it is $((6 * 7))\n")
        terminal.expect("it is 42")
        terminal.keys("exit\n")
        terminal.ends()


def evictions(nodes: Nodes, since: int) -> list[str]:
    """The reasons of those that node2 has logged from line `since` on."""
    lines = nodes.logs("node2").splitlines()[since:]
    return [line.rpartition(": ")[2] for line in lines if line.startswith("evicted ")]


def line_number(nodes: Nodes) -> int:
    return len(nodes.logs("node2").splitlines())


def goes_home(desk: Desk, guest: tuple[Shell, int]) -> None:
    """The guest leaves node2 and comes to its end at home."""
    shell, pid = guest
    until(lambda: not guests_at(desk.nodes, "node2"), "the guest has left")
    assert guests_at(desk.nodes, "node1") == {pid}
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_login_at_the_host_sends_guests_home_and_other_sessions_do_not(
    desk: Desk, nodes: Nodes, guest: tuple[Shell, int]
) -> None:
    since = line_number(nodes)
    nodes.exec("node2", ["su", "-l", "bob", "-c", "true"])
    nodes.exec("node2", ["sudo", "-u", "bob", "true"])
    nodes.exec("node1", ["ssh", "-o", "BatchMode=yes", "node2", "true"])
    for service in ("cron", "systemd-user"):
        nodes.sh("node2", f"PAM_TYPE=open_session PAM_USER=bob PAM_SERVICE={service} {HOOK}")
    # migd hears of all in order.
    log_in(nodes)
    until(lambda: evictions(nodes, since), "migd has heard of the login")
    assert evictions(nodes, since) == ["bob has logged in (login)"]
    goes_home(desk, guest)
    # Both hosts' histories tell why.
    for node, user, way in (("node2", "root", "→ node1"), ("node1", "alice", "← node2")):
        log = nodes.exec(node, ["migctl", "log", "-n", "3"], user=user).stdout
        assert re.search(rf"{way}.*\(evicted: bob has logged in \(login\)\)", log), log


@contextmanager
def remote_logins_count(nodes: Nodes) -> Iterator[None]:
    """The setting is on at node2."""
    reload = 'kill -HUP "$(pgrep -o -f bin/migd)"'
    nodes.sh("node2", f"sed -i '1i remote_logins = true' /etc/migrate/config.toml; {reload}")
    try:
        yield
    finally:
        nodes.sh("node2", f"sed -i 1d /etc/migrate/config.toml; {reload}")


def test_a_login_over_the_network_does_so_if_it_is_set(
    desk: Desk, nodes: Nodes, guest: tuple[Shell, int]
) -> None:
    since = line_number(nodes)
    with remote_logins_count(nodes):
        until(lambda: "configuration reloaded" in nodes.logs("node2"), "it is read")
        nodes.exec("node1", ["ssh", "-o", "BatchMode=yes", "node2", "true"])
        until(lambda: evictions(nodes, since), "migd has heard of the login")
    assert evictions(nodes, since) == ["root has logged in (sshd)"]
    goes_home(desk, guest)


def test_a_login_waits_for_no_migd(desk: Desk, nodes: Nodes, guest: tuple[Shell, int]) -> None:
    migd = nodes.sh("node2", "pgrep -o -f bin/migd")
    nodes.exec("node2", ["kill", "-STOP", migd])
    try:
        log_in(nodes)
        # Full: as after thousands of logins.
        fill = "dd if=/dev/zero of=/run/migrate/logins bs=1 count=70000 oflag=nonblock"
        assert "unavailable" in nodes.exec("node2", fill.split(), check=False).stderr
        log_in(nodes)
        assert guests_at(nodes, "node2"), "nobody knows yet"
    finally:
        nodes.exec("node2", ["kill", "-CONT", migd])
    # What it had heard while it hung is not lost.
    goes_home(desk, guest)
    nodes.node("node2").stop_service("migd")
    try:
        log_in(nodes)
    finally:
        nodes.node("node2").start_service("migd")
