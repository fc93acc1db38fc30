"""Tasks between vfork and execve: CRIU cannot dump them, but that is over within a moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

_WAITS_IN = ("kernel_clone", "_do_fork", "do_fork")


def awaits_child(state: str, kernel_function: str) -> bool:
    """Whether a thread waits until its child of vfork has executed a program or ended.

    :param state: one letter, of proc_pid_stat(5).
    :param kernel_function: of proc_pid_wchan(5).
    """
    return state == "D" and kernel_function in _WAITS_IN


def amid_vfork(proc_fd: int, pids: Iterable[int]) -> bool:
    """Whether a thread of these processes waits for its child of vfork.

    :param proc_fd: of a /proc that knows the pids.
    """
    for pid in pids:
        with contextlib.suppress(OSError):
            tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc_fd)
            try:
                if any(_awaits(tasks, task.name) for task in os.scandir(tasks)):
                    return True
            finally:
                os.close(tasks)
    return False


def _awaits(tasks: int, tid: str) -> bool:
    state = _read(tasks, f"{tid}/stat").rpartition(")")[2].split()[0]
    return state == "D" and awaits_child(state, _read(tasks, f"{tid}/wchan"))


def _read(directory: int, path: str) -> str:
    with open(
        os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory), errors="replace"
    ) as file:
        return file.read()
