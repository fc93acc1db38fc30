"""What groups of processes cost on a host with very many processes."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from testbed.client import Nodes

from bench.errors import BenchFailed
from bench.processes import Task, tasks
from bench.report import Row

HOST = "node1"
PROCESSES = 5000
FEW = 6
SECONDS = 10.0
SHOW_TARGET_MS = 1000.0
CPU_TARGET_MS = 10.0
"""One clock tick: less is not measurable."""

# Forks of a small shell share nearly all of their memory. They end when the pipe is closed.
CROWD = f"""\
exec 3<&0
i=0
while [ $i -lt {PROCESSES} ]; do
    (read line <&3) </dev/null &
    i=$((i + 1))
    pids="$pids $!"
done
echo $pids
read line <&3
"""
SHOW = """\
import subprocess, sys, time
begin = time.perf_counter()
shown = subprocess.run(["showgroup", sys.argv[1]], capture_output=True, check=True).stdout
print(shown.count(b"\\n"), 1000 * (time.perf_counter() - begin))
"""


@contextmanager
def crowd(nodes: Nodes) -> Iterator[list[str]]:
    """So many processes of alice's on one host, by pid, until the block ends."""
    shell = nodes.popen(HOST, ["sh", "-c", CROWD], user="alice", stdin=subprocess.PIPE)
    assert shell.stdin is not None and shell.stdout is not None
    try:
        pids = shell.stdout.readline().decode().split()
        if len(pids) != PROCESSES:
            raise BenchFailed(f"{len(pids)} processes have started, not {PROCESSES}")
        yield pids
    finally:
        shell.stdin.close()
        shell.wait()


def _show(nodes: Nodes, group: int, members: int) -> Row:
    times = []
    for _ in range(5):
        command = ["/opt/migrate/bin/python", "-c", SHOW, str(group)]
        lines, milliseconds = nodes.exec(HOST, command, user="alice").stdout.split()
        if int(lines) != members:
            raise BenchFailed(f"showgroup tells of {lines} processes, not of {members}")
        times.append(float(milliseconds))
    name = f"showgroup, {members} of {PROCESSES} processes"
    return Row(name, median(times), SHOW_TARGET_MS, "ms")


def _servers(nodes: Nodes) -> list[Task]:
    found = tasks(nodes.node(HOST))
    return [one for one in found if "bin/migd" in one.command or "group_files" in one.command]


def _cpu_ms(nodes: Nodes) -> float:
    """CPU time that migd and who serves the files use in a while in which nobody asks them."""
    servers = _servers(nodes)
    before = sum(task.cpu_ms() for task in servers)
    time.sleep(SECONDS)  # an interval is what is measured
    return sum(task.cpu_ms() for task in servers) - before


def group_rows(nodes: Nodes) -> Iterator[Row]:
    """With all these processes: who is in a small group, and in one of all; what they cost at rest."""
    alone_ms = _cpu_ms(nodes)
    with crowd(nodes) as pids:
        nodes.exec(HOST, ["joingroup", *pids[:FEW], "1"], user="alice")
        yield _show(nodes, 1, FEW)
        nodes.exec(HOST, ["joingroup", *pids, "2"], user="alice")
        yield _show(nodes, 2, PROCESSES)
        crowd_ms = _cpu_ms(nodes)
        name = f"CPU in {SECONDS:.0f} s for so many members, at rest"
        note = f"{crowd_ms:.0f} ms, {alone_ms:.0f} ms without them"
        yield Row(name, crowd_ms - alone_ms, CPU_TARGET_MS, "ms", note)
        (server,) = [one for one in _servers(nodes) if "group_files" in one.command]
        yield Row("group files, RSS", server.rss_kib() * 1024 / 1e6, 25, "MB")
