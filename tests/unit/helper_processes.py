"""Small real processes of an ordinary user, for tests that look at processes.

Tests that run as root let them drop to another user first, so that all tests see the same thing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO

HELPER_UID = os.getuid() or 65534
STRANGER_UID = HELPER_UID - 1

_PREAMBLE = """
import ctypes, fcntl, mmap, os, pty, select, signal, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
def tell(*values):
    os.write(1, (" ".join(map(str, values)) + "\\n").encode())
def rest():
    tell("ready")
    while True:
        signal.pause()
def fork(body):
    pid = os.fork()
    if pid:
        return pid
    body()
    while True:
        signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Helper:
    """A helper process that has said something and rests."""

    pid: int
    told: tuple[str, ...]
    """the words of the line it printed before it was ready"""
    stdin: IO[bytes]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The words it told, as numbers."""
        return tuple(map(int, self.told))


@contextmanager
def helper(code: str, *arguments: object, keep: Sequence[int] = ()) -> Iterator[Helper]:
    """Runs `code` until it rests; kills it and its children at the end.

    `code` may use `tell` once, `fork`, and sys.argv[1:]; stdin and stdout are pipes to the test.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"{_PREAMBLE}\n{code}\nrest()", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=tuple(keep),
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        lines: list[str] = []
        while (line := process.stdout.readline().decode().strip()) != "ready":
            lines.append(line)
            assert line or process.poll() is None, "\n".join(lines)
        yield Helper(process.pid, tuple(" ".join(lines).split()), process.stdin)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def without(reason: str) -> str:
    """Text for a skip: what the kernel or the machine lacks."""
    return f"this machine lacks {reason}"
