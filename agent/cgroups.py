"""Control groups, version 2: how trees are frozen, thawed and killed as a whole.

The files are described in the kernel's Documentation/admin-guide/cgroup-v2.rst. None of this needs
a controller, so a hierarchy without any (beside version 1) serves as well.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from migrate.errors import HostError

SLICE = "migrate-guests.slice"
"""Guests live here, never below migd's own service."""
_QUICK_SECONDS = 0.004
"""Less than a grace period takes."""


def hierarchy() -> Path:
    """Where the version 2 hierarchy is mounted. Raises HostError if it is nowhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    raise HostError(
        "cgroup", "no version 2 hierarchy is mounted", "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    )


def guest_path(role: str, guest: str, part: str) -> Path:
    """The cgroup directory of one part (`tree`: the processes; `own`: who looks after them).

    :param role: `guard` or `keeper`: at home a guest may have both.
    """
    return hierarchy() / SLICE / f"{role}-{guest}" / part


def of_process(pid: int) -> Path:
    """The cgroup that a process is in."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return hierarchy() / line[3:].lstrip("/")
    raise HostError(f"pid {pid}", "is in no version 2 cgroup")


class QuickMoves:
    """While it stands, moves between cgroups do not wait.

    The kernel takes a lock for a move that makes the first one wait for an RCU grace period, some
    milliseconds; another that follows soon does not (kernel/cgroup/cgroup.c, kernel/rcu/sync.c). So
    a thread moves this process now and then to where it is already.
    """

    def __init__(self, own: Cgroup) -> None:
        """:param own: where this process is."""
        self._own = own
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _keep(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self._own.add(0)
            if self._over.wait(_QUICK_SECONDS):
                return


class Cgroup:
    """One cgroup directory. Numbers are pids as the caller's pid namespace counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make it, and what is above it."""
        self.path.mkdir(parents=True, exist_ok=True)
        # criu looks at it with access(2), which asks for the real uid: the user's.
        for directory in (self.path, self.path.parent, self.path.parent.parent):
            directory.chmod(0o755)

    def remove(self) -> None:
        """Remove it, if empty; it may be gone already. Raises OSError (EBUSY): it is not empty."""
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

    def add(self, pid: int) -> None:
        """Move a process here, with its threads. Raises ProcessLookupError."""
        self._write("cgroup.procs", str(pid))

    def pids(self) -> frozenset[int]:
        """Its processes; empty if it is gone."""
        try:
            return frozenset(map(int, (self.path / "cgroup.procs").read_text().split()))
        except OSError:
            return frozenset()

    def tids(self) -> frozenset[int]:
        """The threads of its processes; empty if it is gone."""
        try:
            return frozenset(map(int, (self.path / "cgroup.threads").read_text().split()))
        except OSError:
            return frozenset()

    def gather(self, root: int, descendants: Iterable[int]) -> None:
        """Move a tree here: children born while we move are found by looking again."""
        for pid in (root, *descendants):
            with contextlib.suppress(ProcessLookupError):
                self.add(pid)

    def freeze(self) -> None:
        """Ask for it; `wait_frozen` waits."""
        self._write("cgroup.freeze", "1")

    def thaw(self) -> None:
        """Let everything in it run; no error if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._write("cgroup.freeze", "0")

    def kill(self) -> None:
        """SIGKILL to everything in it, also what is frozen or just being forked."""
        with contextlib.suppress(FileNotFoundError):
            self._write("cgroup.kill", "1")

    @property
    def frozen(self) -> bool:
        """Whether every task in it stands still."""
        return self._event("frozen")

    @property
    def populated(self) -> bool:
        """Whether any process (zombies aside) is left in it."""
        return self._event("populated")

    def wait_frozen(self, seconds: float) -> bool:
        """Wait until all stand still; False if that takes longer."""
        return self._wait("frozen", True, seconds)

    def wait_empty(self, seconds: float) -> bool:
        """Wait until all have ended; False if that takes longer."""
        return self._wait("populated", False, seconds)

    def _wait(self, name: str, wanted: bool, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(FileNotFoundError), (self.path / "cgroup.events").open() as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while True:
                file.seek(0)
                try:
                    lines = file.read().splitlines()
                except OSError:  # ENODEV: removed meanwhile
                    return not wanted
                if (f"{name} 1" in lines) is wanted:
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        return not wanted

    def _event(self, name: str) -> bool:
        try:
            return f"{name} 1" in (self.path / "cgroup.events").read_text().splitlines()
        except FileNotFoundError:
            return False

    def _write(self, name: str, text: str) -> None:
        fd = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def dissolve(role: str, guest: str) -> None:
    """Remove the cgroups of a guard or keeper, killing what is in them.

    Only a guest is ever killed here, never a tree at home: that is moved out before, or stays.
    """
    base = hierarchy() / SLICE / f"{role}-{guest}"
    if not base.is_dir():
        return
    for child in [p for p in base.iterdir() if p.is_dir()]:
        cgroup = Cgroup(child)
        if role == "guard" and child.name == "tree":
            with contextlib.suppress(OSError):
                cgroup.remove()
            continue
        cgroup.kill()
        cgroup.thaw()
        cgroup.wait_empty(5)
        # criu leaves its yard behind when it was killed
        for left in [p for p in child.iterdir() if p.is_dir()]:
            with contextlib.suppress(OSError):
                left.rmdir()
        with contextlib.suppress(OSError):
            cgroup.remove()
    with contextlib.suppress(OSError):
        base.rmdir()


def leave_cgroup() -> None:
    """Move this process out of the guest's cgroups, which are about to be removed."""
    with contextlib.suppress(OSError):
        Cgroup(hierarchy()).add(os.getpid())
