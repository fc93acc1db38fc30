"""The nodes that the tests run on: one set for the whole run. And alice's desk on them."""

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
from moving import Desk, leftovers, sweep, until
from testbed.client import Nodes, program_of
from testbed.lifecycle import Testbed

_numbers = itertools.count(1)
LEFT_SECONDS = 60.0
"""For what waits for a peer that will not come any more, and then goes."""


@pytest.fixture(scope="session")
def running_nodes() -> Iterator[Nodes]:
    """Three nodes with the product of this checkout; left up if they were up before."""
    testbed = Testbed()
    was_up = bool(testbed.nodes())
    program = [sys.executable, "-IS", str(program_of(testbed))]
    subprocess.run([*program, "up"], check=True)
    yield Nodes(testbed)
    if not was_up:
        subprocess.run([*program, "down"], check=True)


@pytest.fixture
def nodes(running_nodes: Nodes) -> Iterator[Nodes]:
    """The nodes, for one test; afterwards all are on and connected, what it ran is dead."""
    yield running_nodes
    running_nodes.restore()


@pytest.fixture
def desk(nodes: Nodes) -> Iterator[Desk]:
    """Alice's directory on node1. When the test is over and her programs are dead, nothing of her
    guests is left on any node: that is part of every test that uses it."""
    made = Desk(nodes, f"desk{next(_numbers)}")
    made.set_up()
    before = leftovers(nodes)  # of tests that failed

    def new() -> list[str]:
        return [thing for thing in leftovers(nodes) if thing not in before]

    try:
        yield made
        nodes.restore()
        try:
            until(lambda: not new(), "nothing is left of the guests", LEFT_SECONDS)
        except AssertionError:
            pytest.fail("left behind:\n" + "\n".join(new()))
    finally:
        nodes.restore()
        sweep(nodes)
        made.remove()
