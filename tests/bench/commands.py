"""What `migrate COMMAND` costs, beside ssh in the same run: a command that does nothing, and much output.

Between two commands there is a pause in which spare connections are made again, as between the
commands that somebody types.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from testbed.client import Nodes

from bench.errors import BenchFailed
from bench.report import Row

HOME, AWAY, USER = "node1", "node2", "alice"
PAUSE_SECONDS = 4.0
TIMES = 5
BIG_TIMES = 3
BIG_MIB = 1024
BIG = "/var/bench.big"
"""A directory that is not home's: what ssh reads there, the command reads too."""
CIPHER = "aes128-gcm@openssh.com"
TRUE_TARGET = 1.0
CAT_TARGET = 1 / 0.8
IN_A_ROW, AT_ONCE = 200, 50
FDS_TARGET = 8
"""Connections that are kept ready, or not yet again."""
MEMORY_TARGET_MIB = 4.0

_TIMED = """\
set -o pipefail; a=$EPOCHREALTIME; {} </dev/null | cat >/dev/null || exit
b=$EPOCHREALTIME; echo "$a $b"
"""
_USAGE = r"""
pid=$(pgrep -o -f 'python3 /usr/local/bin/migd')
ls /proc/$pid/fd | wc -l
awk '/VmRSS/ {print $2}' /proc/$pid/status
ps -e -o args= | grep -c '[a]gent.guard\|[a]gent.keeper\|[s]shfs -f\|[a]gent/deputy'
exit 0
"""


@dataclass(frozen=True)
class _Usage:
    fds: int
    memory_kib: int
    processes: int
    """that stand or work for guests"""


def command_rows(nodes: Nodes, progress: Callable[[str], None], *, many: bool) -> list[Row]:
    """
    :param many: measure what many commands leave as well.
    :raises BenchFailed: a command failed.
    """
    progress("commands: one that does nothing")
    rows = [_against_ssh(nodes, "true", "true", TIMES, TRUE_TARGET)]
    progress("commands: much output")
    with _big_file(nodes):
        rows.append(_against_ssh(nodes, f"cat {BIG_MIB} MiB", f"cat {BIG}", BIG_TIMES, CAT_TARGET))
    if many:
        progress(f"commands: {IN_A_ROW} in a row, {AT_ONCE} at once")
        rows += _growth(nodes)
    return rows


def _against_ssh(nodes: Nodes, name: str, command: str, times: int, target: float) -> Row:
    by_ssh, by_us = f"ssh -c {CIPHER} {AWAY} {command}", f"migrate -h {AWAY} {command}"
    ssh, ours = [], []
    for number in range(times + 1):
        one, other = _milliseconds(nodes, by_ssh, ""), _milliseconds(nodes, by_us, USER)
        if number:  # the first finds everything cold
            ssh.append(one)
            ours.append(other)
    note = f"{median(ours):.0f} ms / {median(ssh):.0f} ms"
    return Row(f"migrate -h {AWAY} {name} / ssh", median(ours) / median(ssh), target, note=note)


def _milliseconds(nodes: Nodes, command: str, user: str) -> float:
    time.sleep(PAUSE_SECONDS)
    told = nodes.exec(HOME, ["bash", "-c", _TIMED.format(command)], user=user or "root").stdout
    if len(told.split()) != 2:
        raise BenchFailed(f"failed: {command}")
    begin, end = map(float, told.split())
    return 1000 * (end - begin)


@contextmanager
def _big_file(nodes: Nodes) -> Iterator[None]:
    nodes.sh(AWAY, 'head -c "$1"M /dev/urandom >"$2"; chmod a+r "$2"', str(BIG_MIB), BIG)
    try:
        yield
    finally:
        nodes.sh(AWAY, 'rm "$1"', BIG)


def _growth(nodes: Nodes) -> list[Row]:
    _at_once(nodes)  # as much at once as ever: what an allocator keeps, it has then
    before = _usage(nodes)
    row = f"for i in $(seq {IN_A_ROW}); do migrate -h {AWAY} true </dev/null || exit; done"
    nodes.sh(HOME, row, user=USER, timeout_seconds=600)
    _at_once(nodes)
    after = _usage(nodes)
    name = f"after {IN_A_ROW} + {AT_ONCE} commands, migd's"
    return [
        Row(f"{name} descriptors more", after.fds - before.fds, FDS_TARGET),
        Row(
            f"{name} memory more",
            (after.memory_kib - before.memory_kib) / 1024,
            MEMORY_TARGET_MIB,
            "MiB",
        ),
        Row(f"after {IN_A_ROW} + {AT_ONCE} commands, processes left", after.processes, 0),
    ]


def _at_once(nodes: Nodes) -> None:
    script = f"for i in $(seq {AT_ONCE}); do migrate -h {AWAY} true </dev/null & done; wait"
    nodes.sh(HOME, script, user=USER, timeout_seconds=300)
    time.sleep(PAUSE_SECONDS)


def _usage(nodes: Nodes) -> _Usage:
    """Of the two hosts together."""
    found = [map(int, nodes.sh(node, _USAGE).split()) for node in (HOME, AWAY)]
    return _Usage(*map(sum, zip(*found, strict=True)))
