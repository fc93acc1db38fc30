"""Control groups, version 2: where a testbed's processes are counted, and ended, all of them."""

import select
from functools import cache
from pathlib import Path

from testbed.errors import TestbedError


@cache
def mount_point() -> Path:
    """Where this machine has cgroup v2, alone or beside version 1."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, fstype, *_ = line.split()
        if fstype == "cgroup2":
            return Path(target)
    raise TestbedError("no cgroup2 file system is mounted", "mount one at /sys/fs/cgroup")


def create(name: str) -> Path:
    """The cgroup `name` (its path below the mount), made if need be."""
    path = mount_point() / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def of_process(pid: int) -> str:
    """The path of a process's cgroup; "" if it has gone."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    lines = (line for line in text.splitlines() if line.startswith("0::"))
    return next(lines, "").removeprefix("0::")


def pids(path: Path) -> list[int]:
    """Every process in the cgroup and below."""
    files = [path / "cgroup.procs", *path.rglob("cgroup.procs")] if path.is_dir() else []
    return sorted({int(line) for file in files for line in file.read_text().split() if line != "0"})


def kill(path: Path) -> None:
    """Kill all in the cgroup, wait until it is dead, remove the cgroup; none is fine too."""
    if not path.is_dir():
        return
    (path / "cgroup.kill").write_text("1")
    _wait_empty(path)
    for child in sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True):
        child.rmdir()
    path.rmdir()


def _wait_empty(path: Path, timeout_seconds: float = 20.0) -> None:
    with (path / "cgroup.events").open() as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            if not poll.poll(timeout_seconds * 1000):
                left = ", ".join(map(str, pids(path)))
                raise TestbedError(f"processes do not die: {left}", "look at /proc/PID/stack")
            events.seek(0)
