"""The owner of a host comes back: how long until three guests stand still, and until they run at home."""

from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

from testbed.client import CommandFailed, Nodes

from bench.contestants import AWAY, SETTLE_LINES, Ours
from bench.errors import BenchFailed
from bench.report import Row
from bench.ticker import Ticker

GUESTS = 3
GUEST_MIB = 16
TIMES = 5
FROZEN_TARGET_MS = 50.0
HOME_TARGET_MS = 1000.0

# What pam_exec does at a login, and a look at the guests' cgroups. On stdout: when it began, on the
# monotonic clock that all nodes share, and when the last guest stood still, in seconds.
LOGIN_SCRIPT = """\
import glob, select, subprocess, time
trees = glob.glob("/sys/fs/cgroup/migrate-guests.slice/keeper-*/tree/cgroup.events")
waiting = [open(tree) for tree in trees]
poll = select.poll()
for file in waiting:
    poll.register(file, select.POLLPRI)
begin = time.monotonic()
hook = subprocess.Popen(
    ["/usr/local/lib/migrate/login-hook"],
    env={"PAM_TYPE": "open_session", "PAM_SERVICE": "login", "PAM_USER": "bob"},
)
def runs(file):
    file.seek(0)
    return "frozen 1" not in file.read()
while waiting := [file for file in waiting if runs(file)]:
    poll.poll(10000)
print(len(trees), begin, time.monotonic())
hook.wait()
"""


def eviction_rows(nodes: Nodes) -> Iterator[Row]:
    """Some evictions by login; the medians of the slowest guest of each."""
    frozen, home = [], []
    nodes.exec(AWAY, ["migctl", "pam", "enable"])
    try:
        with ExitStack() as stack:
            tickers = [stack.enter_context(Ticker(nodes, GUEST_MIB)) for _ in range(GUESTS)]
            for _ in range(TIMES):
                for ticker in tickers:
                    Ours(nodes).move(ticker)
                begin, stood = _log_in(nodes)
                for ticker in tickers:
                    ticker.wait_for_lines(SETTLE_LINES)
                frozen.append(stood - begin)
                home.append(max(ticker.ran_again(begin) for ticker in tickers) - begin)
                if any(ticker.tasks(AWAY) for ticker in tickers):
                    raise BenchFailed("a guest has not gone home")
    finally:
        nodes.exec(AWAY, ["migctl", "pam", "disable"])
    name = f"{GUESTS} guests of {GUEST_MIB} MiB after a login"
    yield Row(f"{name}: frozen", median(frozen) * 1000, FROZEN_TARGET_MS, "ms")
    note = "Sprite: 3000"
    yield Row(f"{name}: run at home", median(home) * 1000, HOME_TARGET_MS, "ms", note)


def _log_in(nodes: Nodes) -> tuple[float, float]:
    """:return: when the login began, and when the last guest stood still."""
    try:
        told = nodes.exec(AWAY, ["/opt/migrate/bin/python", "-c", LOGIN_SCRIPT]).stdout
    except CommandFailed as error:
        raise BenchFailed(f"eviction: {error}") from error
    count, begin, end = told.split()
    if int(count) != GUESTS:
        raise BenchFailed(f"eviction: {count} guests are there")
    return float(begin), float(end)
