"""The load database's figures: one central daemon with a thousand hosts, and a client's two calls."""

import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from testbed.client import Nodes

from bench.errors import BenchFailed
from bench.report import Row
from migrate import mig_messages as mig
from migrate.framing import FrameDecoder, encode_frame

HOSTS = 1000
REPORT_SECONDS = 60.0
CLIENTS = 16
CALM_SECONDS = 15.0
BUSY_SECONDS = 8.0
PAIRS = 300
HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
TICKS = os.sysconf("SC_CLK_TCK")

# A client's program: the median of so many pairs, in milliseconds.
PAIR_SCRIPT = f"""\
import time
from statistics import median
from migrate import mig
m = mig.Mig()
times = []
for _ in range({PAIRS}):
    begin = time.perf_counter()
    hosts = m.request_idle_hosts(1)
    m.return_hosts(hosts)
    times.append(time.perf_counter() - begin)
    assert hosts, "no host was idle"
print(m.get_stats().central, 1000 * median(times))
"""


@dataclass(frozen=True)
class Process:
    """A process whose cost is watched."""

    pid: int

    def cpu_seconds(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        """Resident memory now, in megabytes of 10^6 bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise BenchFailed("the central daemon has died")


@contextmanager
def program(name: str, *words: str) -> Iterator[Process]:
    """One of the programs of this directory, from "ready" on until the block ends."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(HERE / name), *words]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise BenchFailed(f"{name} did not start")
        yield Process(process.pid)
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pairs_a_second(path: Path, seconds: float) -> float:
    """Request and return by some clients at once, each of which waits for its answers."""
    ask = encode_frame(mig.encode(mig.RequestHosts(1, machine="x86_64")))
    clients: dict[int, tuple[socket.socket, FrameDecoder]] = {}
    poll = select.epoll()
    with ExitStack() as stack:
        stack.callback(poll.close)
        for _ in range(CLIENTS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
            sock.sendall(encode_frame(mig.encode(mig.Open())))
            clients[sock.fileno()] = (sock, FrameDecoder())
            poll.register(sock, select.EPOLLIN)
        done = 0
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for fd, _ in poll.poll(1):
                sock, decoder = clients[fd]
                for frame in decoder.feed(sock.recv(65536)):
                    match mig.decode_answer(frame):
                        case mig.Granted(hosts):
                            if not hosts:
                                raise BenchFailed("no host was idle")
                            sock.send(encode_frame(mig.encode(mig.ReturnHosts(hosts))))
                        case mig.Done():
                            done += 1
                            sock.send(ask)
                        case mig.Opened():
                            sock.send(ask)
                        case other:
                            raise BenchFailed(f"the central daemon says {other}")
        return done / (time.monotonic() - begin)


def central_rows() -> Iterator[Row]:
    """What one central daemon with a thousand hosts costs and does."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-load-")))
        central = stack.enter_context(program("load_central.py", str(directory), str(HOSTS)))
        words = (str(directory), str(HOSTS), str(REPORT_SECONDS))
        stack.enter_context(program("load_hosts.py", *words))
        name = f"central daemon, {HOSTS} hosts reporting"
        note = "behind the bridge; sshd's own cost is not in it"
        before = central.cpu_seconds()
        time.sleep(CALM_SECONDS)
        percent = 100 * (central.cpu_seconds() - before) / CALM_SECONDS
        yield Row(f"{name}: CPU", percent, 10, "%", note)
        rate = pairs_a_second(directory / "load.sock", BUSY_SECONDS)
        pairs = f"{rate:.0f} pairs a second; Sprite: 67"
        yield Row("1000 request/return pairs, 1000 hosts", 1e6 / rate, 1e6 / 3000, "ms", pairs)
        yield Row(f"{name}: RSS", central.rss_mb(), 150, "MB", note)


def client_rows(nodes: Nodes) -> Iterator[Row]:
    """What a client waits for a host, on the central daemon's host and on another."""
    for node in nodes.names:
        command = ["/opt/migrate/bin/python", "-c", PAIR_SCRIPT]
        central, milliseconds = nodes.exec(node, command, user="alice").stdout.split()
        where = "at the central daemon" if central == node else "from another host"
        yield Row(f"choose and release a host, {where}", float(milliseconds), 3, "ms", "Sprite: 36")
