"""Holds a migration at a point of its way (agent/faults.py), to do something there."""

import contextlib
import select
import subprocess
from collections.abc import Iterator

import pytest
from testbed.client import Nodes


@contextlib.contextmanager
def held(nodes: Nodes, node: str, point: str) -> Iterator[subprocess.Popen[bytes]]:
    """A migration waits at `point` on `node` while the body runs; `stdout` says when it is there."""
    pipe = f"/run/migrate/faults/{point}"
    nodes.sh(node, f"mkdir -p -m 0700 /run/migrate/faults; mkfifo -m 0600 {pipe}")
    script = f"exec 3>{pipe}; echo reached; read line; rm -f {pipe}"
    holder = nodes.popen(node, ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield holder
    finally:
        nodes.sh(node, f"rm -f {pipe}")
        holder.kill()
        holder.wait()


def await_reached(holder: subprocess.Popen[bytes], client: subprocess.Popen[bytes]) -> None:
    """Return when the point is reached; fail if what was to reach it ends before."""
    assert holder.stdout is not None
    while not select.select([holder.stdout], [], [], 0.1)[0]:
        if client.poll() is not None:
            told = client.stderr.read().decode() if client.stderr is not None else ""
            pytest.fail(f"it ended before, with {client.returncode}: {told}")
    assert holder.stdout.readline() == b"reached\n"


def let_go(holder: subprocess.Popen[bytes]) -> None:
    assert holder.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        holder.stdin.write(b"\n")
        holder.stdin.flush()
