"""Who moves the program: bare CRIU, what people do by hand, and migrate.

Each move is given a running Ticker; the silence is measured outside, in the same way for all.
CRIU is called by its command line. Its images lie in /run, in memory: at the hand-made script too,
which so does better than it would on a disk.
"""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from testbed.client import CommandFailed, Nodes

from bench.errors import BenchFailed
from bench.ticker import HOME, USER, Ticker

AWAY = "node2"
SETTLE_LINES = 100
MOVE_SECONDS = 120.0

# criu runs with the owner's real uid and gid: root of a container lacks CAP_SYS_RESOURCE.
# $1 directory of images, $2 pid, $3 the pipe's name; then uid and gid.
_DUMP = """
set -eu
images=$1 pid=$2 pipe=$3 owner="setpriv --ruid $4 --rgid $5 --keep-groups" peer=$6
mkdir "$images"
trap 'rm -rf "$images"' EXIT
$owner criu dump --tree "$pid" --images-dir "$images" --log-file dump.log \\
    --shell-job --manage-cgroups=ignore || { grep Error "$images/dump.log" >&2; exit 1; }
"""
_BARE = f"""{_DUMP}
$owner criu restore --restore-detached --images-dir "$images" --log-file restore.log \\
    --shell-job --manage-cgroups=ignore --inherit-fd "fd[1]:$pipe" ||
    {{ grep Error "$images/restore.log" >&2; exit 1; }}
"""
_BY_HAND = f"""{_DUMP}
tar -C "$images" -cf - . | ssh -c aes128-gcm@openssh.com "$peer" "
    mkdir '$images' && trap 'rm -rf \\"$images\\"' EXIT && tar -C '$images' -xf - &&
    $owner unshare --pid --mount-proc --fork criu restore \\
        --images-dir '$images' --log-file restore.log --shell-job \\
        --manage-cgroups=ignore --inherit-fd 'fd[1]:$pipe' </dev/null"
"""
_OURS = 'echo "$EPOCHREALTIME"; migrate -p "$1" -h "$2"; s=$?; echo "$EPOCHREALTIME"; exit "$s"'


@dataclass(frozen=True)
class Move:
    """What one move cost.

    :param silence_ms: the longest time between two lines.
    :param wall_ms: how long the command took; 0 if it goes on as long as the program.
    """

    silence_ms: float
    wall_ms: float = 0.0


class Contestant(Protocol):
    """One way to move a program."""

    name: str
    moves_per_program: int
    """after so many moves a new program is started"""

    def move(self, ticker: Ticker) -> Move:
        """Move it once. :raises BenchFailed: if that fails or a line gets lost."""


@dataclass
class Bare:
    """criu dump and criu restore on one node."""

    nodes: Nodes
    name: str = "bare CRIU"
    moves_per_program: int = 4

    def move(self, ticker: Ticker) -> Move:
        before = time.monotonic()
        with _script(ticker, _BARE) as script:
            _expect_success(script, self.name)
        ticker.wait_for_lines(SETTLE_LINES)
        return Move(ticker.longest_silence_ms(before))


@dataclass
class ByHand:
    """criu dump; tar over one ssh; criu restore in a pid namespace on the other node.

    That is what criu-ns does; criu-ns itself wants a terminal for a job of a shell.
    """

    nodes: Nodes
    name: str = "by hand"
    moves_per_program: int = 1

    def move(self, ticker: Ticker) -> Move:
        before = time.monotonic()
        with _script(ticker, _BY_HAND) as script:
            try:
                ticker.shell.wait(MOVE_SECONDS)  # criu has dumped and killed the original
                ticker.wait_for_lines(SETTLE_LINES)
            except (BenchFailed, subprocess.TimeoutExpired):
                script.terminate()
                _expect_success(script, self.name)
                raise
            silence_ms = ticker.longest_silence_ms(before)
            ticker.close()  # the script goes on until the program has ended
            script.wait(MOVE_SECONDS)
        return Move(silence_ms)


@dataclass
class Ours:
    """migrate -p, from home to the other node and back, as the program's owner."""

    nodes: Nodes
    name: str = "migrate"
    moves_per_program: int = 4

    def move(self, ticker: Ticker) -> Move:
        target = HOME if ticker.tasks(AWAY) else AWAY
        before = time.monotonic()
        command = ["bash", "-c", _OURS, "bash", str(ticker.pid), target]
        try:
            output = self.nodes.exec(HOME, command, user=USER, timeout_seconds=MOVE_SECONDS).stdout
        except (CommandFailed, subprocess.TimeoutExpired) as error:
            raise BenchFailed(f"{self.name}: {error}") from error
        ticker.wait_for_lines(SETTLE_LINES)
        start, *_, end = output.split()
        return Move(ticker.longest_silence_ms(before), (float(end) - float(start)) * 1000)


def repeat(contestant: Contestant, nodes: Nodes, mebibytes: int, count: int) -> Iterator[Move]:
    """Move programs of one size `count` times."""
    left = count
    while left:
        with Ticker(nodes, mebibytes) as ticker:
            for _ in range(min(left, contestant.moves_per_program)):
                yield contestant.move(ticker)
                left -= 1


@contextmanager
def _script(ticker: Ticker, text: str) -> Iterator[subprocess.Popen[bytes]]:
    """A shell script as root at home, its standard output the program's pipe."""
    user = ticker.nodes.sh(HOME, "id -u; id -g", user=USER).split()
    arguments = [f"/run/{ticker.mark}", str(ticker.pid), ticker.pipe_key, *user, AWAY]
    with ticker.nodes.popen(
        HOME, ["sh", "-c", text, "sh", *arguments], stdout=ticker.writing_end
    ) as script:
        try:
            yield script
        finally:
            if script.poll() is None:
                script.terminate()


def _expect_success(script: subprocess.Popen[bytes], name: str) -> None:
    _, errors = script.communicate(timeout=MOVE_SECONDS)
    if script.returncode != 0:
        words = errors.decode(errors="replace").strip()
        raise BenchFailed(f"{name}: status {script.returncode}: {words}")


def warm_up(nodes: Nodes, names: Sequence[str] = (HOME, AWAY)) -> None:
    """Have CRIU look at each kernel once: its first call takes 30 ms more."""
    for name in names:
        nodes.exec(name, ["criu", "check"], check=False)
