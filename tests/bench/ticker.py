"""The program that is moved, and how long it falls silent: the same measure for every contestant.

It holds a block of random bytes and writes a number every 2 ms to a pipe. The other end of the pipe
stays with us, at home, whoever moves the program: so does the clock.
"""

import os
import signal
import subprocess
import threading
import time
from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

from testbed.client import Nodes

from bench.errors import BenchFailed
from bench.processes import Task, tasks

INTERVAL_SECONDS = 0.002
HOME = "node1"
USER = "alice"
ANSWER_SECONDS = 60.0
END_SECONDS = 5.0
# argv: MiB to hold; a mark by which its processes are known.
PROGRAM = f"""\
import os, signal, sys, time
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
block = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]
os.write(1, b"%d\\n" % os.getpid())
number = 0
while True:
    number += 1
    os.write(1, b"%d\\n" % number)
    time.sleep({INTERVAL_SECONDS})
"""
# A shell that waits, as alice's would: it reaps the program, so that its pid can be used again.
SHELL = 'python3 -ISc "$1" "$2" "$3" & wait $!'


@dataclass
class Ticker:
    """The running program. A context manager: at the end of the block it is dead.

    :param mebibytes: of random bytes that it holds.
    """

    nodes: Nodes
    mebibytes: int
    mark: str = field(default_factory=lambda: f"bench-{os.getpid()}-{time.monotonic_ns()}")
    pid: int = 0
    pipe_inode: int = 0
    writing_end: int = -1
    _reading_end: int = -1
    _times: "array[float]" = field(default_factory=lambda: array("d"))
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _failure: str = ""

    def __enter__(self) -> Self:
        self._reading_end, self.writing_end = os.pipe()
        self.pipe_inode = os.fstat(self._reading_end).st_ino
        command = ["sh", "-c", SHELL, "sh", PROGRAM, str(self.mebibytes), self.mark]
        self.shell = self.nodes.popen(
            HOME, command, user=USER, stdout=self.writing_end, stderr=subprocess.DEVNULL
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.wait_for_lines(100)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pipe_key(self) -> str:
        """CRIU's name of its standard output, for --inherit-fd."""
        return f"pipe:[{self.pipe_inode}]"

    def tasks(self, node: str) -> list[Task]:
        """Its processes on a node, its deputy and its shell among them."""
        return [task for task in tasks(self.nodes.node(node)) if self.mark in task.command]

    @property
    def original(self) -> Task:
        """What bears its pid at home, outside of any capsule: itself at first, then its deputy."""
        return next(task for task in self.tasks(HOME) if task.node_pids() == [self.pid])

    def wait_for_lines(self, count: int) -> None:
        """Return when it has written `count` more lines.

        :raises BenchFailed: if a line got lost or came twice, or nothing comes any more.
        """
        with self._changed:
            wanted = len(self._times) + count
            self._changed.wait_for(
                lambda: self._failure or len(self._times) >= wanted, ANSWER_SECONDS
            )
            if len(self._times) < wanted:
                raise BenchFailed(self._failure or "the program has fallen silent")

    def longest_silence_ms(self, since: float) -> float:
        """The longest time between two lines of which the second came after `since`.

        :param since: on the monotonic clock, seconds.
        """
        with self._changed:
            times = list(self._times)
        pairs = pairwise(times)
        return max(after - before for before, after in pairs if after > since) * 1000

    def ran_again(self, since: float) -> float:
        """When the longest silence after `since` was over; both on the monotonic clock, in seconds."""
        with self._changed:
            times = [at for at in self._times if at >= since]
        return max(pairwise(times), key=lambda pair: pair[1] - pair[0])[1]

    def close(self) -> None:
        """End it wherever it is: nobody reads its lines any more, it dies of SIGPIPE."""
        if self.writing_end < 0:
            return
        # A close would not wake the thread; so its next read ends, on another file.
        os.close(self.writing_end)
        self.writing_end = -1
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, self._reading_end)
        os.close(null)
        try:
            self.shell.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.shell.terminate()
            self.shell.wait(END_SECONDS)
        finally:
            self._kill_rest()
        self._reader.join(END_SECONDS)
        os.close(self._reading_end)

    def _kill_rest(self) -> None:
        """What a contestant restored is not the shell's child any more."""
        deadline = time.monotonic() + END_SECONDS
        for node in self.nodes.names:
            for task in self.tasks(node):
                if not task.wait(deadline - time.monotonic()):
                    task.signal(signal.SIGKILL)

    def _read(self) -> None:
        rest = b""
        expected = 1
        while data := os.read(self._reading_end, 1 << 16):
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            with self._changed:
                for line in lines:
                    if not self.pid:
                        self.pid = int(line)
                        continue
                    if int(line) != expected:
                        self._failure = f"line {expected} got lost: {line.decode()} came"
                        self._changed.notify_all()
                        return
                    expected += 1
                    self._times.append(now)
                self._changed.notify_all()
