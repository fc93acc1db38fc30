"""Something dies, or a cable is pulled, at each point of a migration: never two copies, none lost before RESUMED."""

from __future__ import annotations

import contextlib
import subprocess
import time

import pytest
from holding import await_reached, held, let_go
from testbed.client import Nodes

COUNTER = """
import os, sys, time
fd = os.open("/home/alice/counter", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
n = 0
while not os.path.exists("/home/alice/stop"):
    n += 1
    os.write(fd, b"%d\\n" % n)
    time.sleep(0.01)
sys.exit(7)
"""
SOURCE_POINTS = (
    "source-begun",
    "source-frozen",
    "source-dumped",
    "source-ready",
    "source-committed",
    "source-answered",
)
DESTINATION_POINTS = (
    "destination-prepared",
    "destination-received",
    "destination-restored",
    "destination-commit",
    "destination-recorded",
    "destination-thawed",
)
SETTLED_SECONDS = 60


class Counter:
    """A program of alice's on node1 that counts into a file at home, and her shell that waits for it."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        nodes.sh("node1", "rm -f /home/alice/counter /home/alice/stop /home/alice/status")
        nodes.sh("node1", "cat > /home/alice/counter.py <<'EOF'\n" + COUNTER + "\nEOF")
        script = (
            "python3 /home/alice/counter.py & echo $! > /home/alice/pid; wait $!;"
            " echo $? > /home/alice/status"
        )
        self.shell = nodes.popen("node1", ["bash", "-c", script], user="alice")
        self.await_growth()
        self.pid = int(nodes.sh("node1", "cat /home/alice/pid"))

    def lines(self) -> list[str]:
        text = self.nodes.sh("node1", "cat /home/alice/counter 2>/dev/null || true")
        return text.split("\n")[:-1]

    def grows(self, seconds: float) -> bool:
        """Whether it counts on within so many seconds."""
        start = len(self.lines())
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if len(self.lines()) > start + 3:
                return True
        return False

    def await_growth(self) -> None:
        assert self.grows(SETTLED_SECONDS), "the program does not count"

    def status(self) -> str:
        return self.nodes.sh("node1", "cat /home/alice/status 2>/dev/null || true").strip()

    def assert_one_copy(self) -> None:
        """Every number exactly once and in order: two copies would write some twice."""
        numbers = [int(line) for line in self.lines()]
        assert numbers == list(range(1, len(numbers) + 1))


def strike(nodes: Nodes, victim: str) -> None:
    """Kill the victim with SIGKILL, or pull the cable of the destination."""
    if victim == "cable":
        nodes.cut("node2")
        return
    kind, _, node = victim.partition("@")
    # Bracketed, so that the shell which searches does not find itself.
    pattern = {
        "guard": "[a]gent.guard",
        "keeper": "[a]gent.keeper",
        "migd": "[b]in/migd",
        "criu": "^criu: (dump|restore) --rpc",
    }
    nodes.sh(node, f"pkill -KILL -f -o '{pattern[kind]}'")


SOURCE_VICTIMS = ("guard@node1", "migd@node1", "keeper@node2", "cable")
DESTINATION_VICTIMS = ("guard@node1", "migd@node2", "keeper@node2", "cable")
CASES = [
    *[(point, "node1", victim) for point in SOURCE_POINTS for victim in SOURCE_VICTIMS],
    *[(point, "node2", victim) for point in DESTINATION_POINTS for victim in DESTINATION_VICTIMS],
    ("source-criu", "node1", "criu@node1"),
    ("destination-criu", "node2", "criu@node2"),
]


@pytest.mark.parametrize(("point", "node", "victim"), CASES, ids=lambda value: str(value))
def test_never_two_copies_and_none_lost_before_it_resumed(
    nodes: Nodes, point: str, node: str, victim: str
) -> None:
    counter = Counter(nodes)
    with held(nodes, node, point) as holder:
        client = nodes.popen(
            "node1",
            ["migrate", "-p", str(counter.pid), "-h", "node2"],
            user="alice",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await_reached(holder)
        strike(nodes, victim)
        let_go(holder)
        if victim == "cable":
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(3)
            nodes.heal("node2")
        client.wait(SETTLED_SECONDS)
    deadline = time.monotonic() + SETTLED_SECONDS
    while time.monotonic() < deadline and not counter.grows(1) and not counter.status():
        pass
    counter.assert_one_copy()
    if counter.status():
        # Lost: only if what held the resumed guest was killed, and then the shell must know it.
        assert point in ("source-committed", "source-answered", *DESTINATION_POINTS[3:]), "lost"
        assert victim.startswith(("guard", "keeper")), "lost"
        assert counter.status() == "137"
        assert not counter.grows(1)
    else:
        counter.await_growth()
        nodes.sh("node1", "touch /home/alice/stop", user="alice")
        counter.shell.wait(SETTLED_SECONDS)
        assert counter.status() == "7"
    counter.assert_one_copy()
