"""A destination that is not like the source refuses before anything freezes, and says in what it differs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from moving import Desk
from test_refusals import counter, refused

__all__ = ["counter"]

HELLO = "/opt/migrate/lib/python3.*/site-packages/agent/peer_hello.py"


@contextmanager
def shown(desk: Desk, node: str, path: str, script: str) -> Iterator[None]:
    """A node whose file in /proc reads as `script` (sed) makes it."""
    fake = f"/run/fake{path.replace('/', '-')}"
    desk.nodes.sh(
        node,
        'sed -E "$1" "$2" >"$3" && chmod 644 "$3" && mount --bind "$3" "$2"',
        script,
        path,
        fake,
    )
    try:
        yield
    finally:
        desk.nodes.sh(node, 'umount "$1"; rm "$2"', path, fake)


@contextmanager
def edited(desk: Desk, node: str, script: str, path: str) -> Iterator[None]:
    """A node whose migd runs with another line in one of its files (sed), until the end."""
    desk.nodes.sh(node, f'sed -i.kept "$1" {path}', script)
    try:
        desk.nodes.restart_migd(node)
        yield
    finally:
        desk.nodes.sh(node, f'for kept in {path}.kept; do mv "$kept" "${{kept%.kept}}"; done')
        desk.nodes.restart_migd(node)


def test_a_processor_that_lacks_a_feature(desk: Desk, counter: int) -> None:
    flag = desk.nodes.sh("node1", "grep -m1 ^flags /proc/cpuinfo").split()[-1]
    with shown(desk, "node2", "/proc/cpuinfo", f"s/ {flag}$//"):
        line = refused(desk, "-p", str(counter), "-h", "node2")
    assert line == f"migrate: host node2: its processor lacks {flag}; choose another host"


def test_too_little_memory(desk: Desk, counter: int) -> None:
    with shown(desk, "node2", "/proc/meminfo", "s/^(MemAvailable|MemFree):.*/\\1: 2048 kB/"):
        line = refused(desk, "-p", str(counter), "-h", "node2")
    assert line.startswith("migrate: host node2: has 2 MiB of memory free, ")


def test_another_architecture(desk: Desk, counter: int) -> None:
    program = "/opt/migrate/bin/migd"
    wrapper = f'#!/bin/sh\\nexec setarch i686 {program}.real "$@"\\n'
    desk.nodes.sh("node2", f"mv {program} {program}.real; printf '{wrapper}' >{program}")
    desk.nodes.sh("node2", f"chmod 755 {program}")
    try:
        desk.nodes.restart_migd("node2")
        line = refused(desk, "-p", str(counter), "-h", "node2")
    finally:
        desk.nodes.sh("node2", f"mv {program}.real {program}")
        desk.nodes.restart_migd("node2")
    ours = desk.nodes.sh("node1", "uname -m")
    assert line == f"migrate: host node2: is i686, the process {ours}; choose another host"


@pytest.mark.parametrize("other", ["node1", "node2"])
def test_another_version_is_named_with_ours(desk: Desk, counter: int, other: str) -> None:
    with edited(desk, other, "s/^PROTOCOL = .*/PROTOCOL = 77/", HELLO):
        line = refused(desk, "-p", str(counter), "-h", "node2")
    assert "protocol 77" in line
    assert "node1" in line
    assert "upgrade migrate on " + ("node2" if other == "node1" else "node1") in line
