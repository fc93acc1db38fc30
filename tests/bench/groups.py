"""What groups of processes cost on a host with very many processes."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from testbed.client import Nodes

from bench.errors import BenchFailed
from bench.processes import tasks
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
done
echo $(jobs -p)
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


def group_rows(nodes: Nodes) -> Iterator[Row]:
    """With all these processes: who is in a small group, and in one of all; CPU at rest."""
    with crowd(nodes) as pids:
        nodes.exec(HOST, ["joingroup", *pids[:FEW], "1"], user="alice")
        yield _show(nodes, 1, FEW)
        nodes.exec(HOST, ["joingroup", *pids, "2"], user="alice")
        yield _show(nodes, 2, PROCESSES)
        servers = [
            task
            for task in tasks(nodes.node(HOST))
            if "bin/migd" in task.command or "agent.group_files" in task.command
        ]
        before = sum(task.cpu_ms() for task in servers)
        time.sleep(SECONDS)  # an interval is what is measured
        used = sum(task.cpu_ms() for task in servers) - before
        name = f"the same, migd and group files, CPU in {SECONDS:.0f} s"
        yield Row(name, used, CPU_TARGET_MS, "ms")
        memory = sum(task.rss_kib() for task in servers if "group_files" in task.command)
        yield Row("group files, RSS", memory * 1024 / 1e6, 25, "MB")
