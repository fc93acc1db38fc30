"""The processes of a node as the machine sees them, and what memory they take."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from testbed.node import Node

GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


@dataclass(frozen=True)
class Task:
    """A process. :param pid: the machine's. :param command: its argv, joined by blanks."""

    pid: int
    command: str

    def wait(self, seconds: float) -> bool:
        """Wait for its end. :return: whether it has ended."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.pid)
            try:
                return bool(select.select([pidfd], [], [], max(0.0, seconds))[0])
            finally:
                os.close(pidfd)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; none if it has gone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def rss_kib(self) -> int:
        """What it has in memory, shared or not; 0 if it has gone."""
        return self._field("status", "VmRSS:")

    def anonymous_kib(self) -> int:
        """What it has in memory that is no page of a file; 0 if it has gone."""
        return self._field("status", "RssAnon:")

    def pss_kib(self) -> int:
        """What it has in memory, a page that n processes share counted as 1/n; 0 if it has gone."""
        return self._field("smaps_rollup", "Pss:")

    def node_pids(self) -> list[int]:
        """Its pid in the node, and in each pid namespace within; none if it has gone."""
        with suppress(*GONE):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("NSpid:"):
                    return [int(word) for word in line.split()[2:]]
        return []

    def cpu_ms(self) -> float:
        """CPU time of all its threads so far."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e6

    def _field(self, file: str, name: str) -> int:
        with suppress(*GONE):
            for line in Path(f"/proc/{self.pid}/{file}").read_text().splitlines():
                if line.startswith(name):
                    return int(line.split()[1])
        return 0


def tasks(node: Node) -> list[Task]:
    """All processes of a node, but kernel threads and zombies."""
    found = []
    for pid in _pids(node):
        with suppress(*GONE):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
            if command:
                found.append(Task(pid, command.replace(b"\0", b" ").decode(errors="replace")))
    return found


def _pids(node: Node) -> set[int]:
    """Of every process of a node, while cgroups come and go."""
    found: set[int] = set()
    for directory, _, files in os.walk(node.cgroup):
        if "cgroup.procs" in files:
            with suppress(OSError):  # that cgroup has been removed
                words = (Path(directory) / "cgroup.procs").read_text().split()
                found.update(int(word) for word in words)
    return found - {0}


def _memory_file_systems(node: Node) -> Iterator[tuple[int, str]]:
    """Each tmpfs of a node: device number, a path to it. In whatever mount namespace it is."""
    namespaces: set[str] = set()
    for pid in _pids(node):
        with suppress(*GONE):
            namespace = str(Path(f"/proc/{pid}/ns/mnt").readlink())
            if namespace in namespaces:
                continue
            namespaces.add(namespace)
            for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
                mount, _, rest = line.partition(" - ")
                if rest.startswith("tmpfs "):
                    words = mount.split()
                    major, minor = map(int, words[2].split(":"))
                    yield os.makedev(major, minor), f"/proc/{pid}/root{words[4]}"


def tmpfs_kib(node: Node) -> int:
    """What lies in all file systems in memory of a node."""
    used: dict[int, int] = {}
    for device, path in _memory_file_systems(node):
        with suppress(OSError):
            if device not in used and Path(path).stat().st_dev == device:  # not mounted over
                state = os.statvfs(path)
                used[device] = (state.f_blocks - state.f_bfree) * state.f_frsize // 1024
    return sum(used.values())


def memory_kib(node: Node) -> int:
    """Memory that a node's processes and files in memory take, pages of files on disk left out."""
    return sum(task.anonymous_kib() for task in tasks(node)) + tmpfs_kib(node)
