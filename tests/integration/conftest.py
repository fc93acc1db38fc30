"""The nodes that the tests run on: one set for the whole run."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from testbed.client import Nodes, program_of
from testbed.lifecycle import Testbed


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
