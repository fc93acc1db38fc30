"""The load database: every host is known, an idle one is chosen, claims end, another host takes over."""

import json
import re
from collections.abc import Iterator

import pytest
from moving import Desk, guests_at, until
from testbed.client import Nodes

HOLD = """\
import sys
from migrate import mig
print("got", *mig.request_idle_hosts(int(sys.argv[1])), flush=True)
for line in sys.stdin:
    print("did", eval(line), flush=True)
"""
"""A client: claims hosts, then does what it is told, one expression a line."""


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
    """Before each test all hosts are known to the central daemon."""
    until(lambda: all_up(nodes), "all hosts have reported")
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
