"""What is between vfork and execve is told apart from what runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_hooks.vfork import amid_vfork

# Its child of vfork waits until somebody writes into the fifo, then executes `true`.
PROGRAM = """
import os, sys
sys.stdout.write("\\n"); sys.stdout.flush()
action = (os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)
os.waitpid(os.posix_spawn("/bin/true", ["true"], {}, file_actions=[action]), 0)
sys.stdout.write("\\n"); sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def proc_fd() -> Iterator[int]:
    fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_a_process_is_amid_vfork_until_its_child_has_executed(tmp_path: Path, proc_fd: int) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fifo)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not amid_vfork(proc_fd, [process.pid]):
            assert process.poll() is None
        fifo.write_text("")
        process.stdout.readline()
        assert not amid_vfork(proc_fd, [process.pid])


def test_a_process_that_is_gone_is_not(proc_fd: int) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert not amid_vfork(proc_fd, [process.pid])
