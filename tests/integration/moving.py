"""Alice at work on several hosts: her directory, her shells, her moves, and what must not be left of them."""

import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from programs import PROGRAMS
from testbed.client import Nodes, Result

PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 0.01
SLICE = "migrate-guests.slice"
OURS = re.compile(r"agent\.(guard|keeper)|agent/deputy|sshfs|sftp-server|criu")
"""Command lines of processes that stand or work for a guest."""

T = TypeVar("T")


def until(holds: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
    """Look again and again until `holds()` is true. :return: what it returned. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(LOOK_SECONDS)
    return found


class Shell:
    """A script of a user's, running in a bash on a node; its stdout is read line by line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._complaints: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_complaints, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode().rstrip("\n"))
        self._lines.put(None)

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        self._complaints += [line.decode() for line in self._process.stderr]

    def line(self, seconds: float = PATIENCE_SECONDS) -> str:
        """Its next line; "" at the end of its output."""
        try:
            return self._lines.get(timeout=seconds) or ""
        except queue.Empty:
            raise AssertionError(f"the shell said nothing for {seconds:g} s") from None

    def says(self, word: str) -> list[str]:
        """The rest of its next line, which must begin with `word`, as words."""
        line = self.line()
        assert line.split(" ")[0] == word, f"{line!r}, not {word}; {''.join(self._complaints)}"
        return line.split(" ")[1:]

    def pid(self) -> int:
        """The pid that its script tells in a line "pid N"."""
        return int(self.says("pid")[0])

    def status(self) -> int:
        """The exit status of its job, told in a line "status N"."""
        return int(self.says("status")[0])

    def rest(self) -> list[str]:
        """All further lines up to the end of its output."""
        lines = []
        while line := self.line():
            lines.append(line)
        return lines

    def wait(self) -> int:
        """Its own exit status."""
        return self._process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """Let go of it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(PATIENCE_SECONDS)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Count:
    """What the program counter.py has said."""

    numbers: list[int]
    ids: set[str]
    """each "PID PPID PGID SID" that it saw of itself"""
    words: list[str]
    """the other lines"""

    @staticmethod
    def of(text: str) -> "Count":
        """Only whole lines count."""
        lines = text.split("\n")[:-1]
        counted = [line for line in lines if line[:1].isdigit()]
        return Count(
            [int(line.split(" ")[0]) for line in counted],
            {line.partition(" ")[2] for line in counted},
            [line for line in lines if not line[:1].isdigit()],
        )

    @property
    def unbroken(self) -> bool:
        """Every number was said once and in order."""
        return self.numbers == list(range(1, len(self.numbers) + 1))


@dataclass
class Desk:
    """A directory of a user's at home on `home`, with the programs of these tests in it."""

    nodes: Nodes
    name: str
    home: str = "node1"
    user: str = "alice"
    shells: list[Shell] = field(default_factory=list)

    @property
    def directory(self) -> str:
        """As the user writes it."""
        return f"/home/{self.user}/{self.name}"

    def set_up(self) -> None:
        """Make the directory and the programs."""
        script = (
            'mkdir "$1"; cd "$1"; shift; while [ $# -gt 0 ]; do printf %s "$2" >"$1"; shift 2; done'
        )
        words = [word for item in PROGRAMS.items() for word in item]
        self.nodes.sh(self.home, script, self.directory, *words, user=self.user)

    def remove(self) -> None:
        """End what runs, remove the directory."""
        for shell in self.shells:
            shell.close()
        self.nodes.sh(self.home, 'rm -rf "$1"', self.directory)

    # ------------------------------------------------------------------ files at home

    def path(self, name: str) -> Path:
        """A file here, as the machine that runs the tests sees it."""
        pid = self.nodes.node(self.home).pid_or_error()
        return Path(f"/proc/{pid}/root{self.directory}/{name}")

    def read(self, name: str) -> str:
        """The contents of a file here; "" if there is none."""
        with suppress(FileNotFoundError):
            return self.path(name).read_text()
        return ""

    def write(self, name: str, text: str = "") -> None:
        """Have the user create a file here at once, with its contents."""
        script = 'cd "$1" && printf %s "$3" >"$2.new" && mv "$2.new" "$2"'
        self.nodes.sh(self.home, script, self.directory, name, text, user=self.user)

    def enough(self) -> None:
        """Tell the programs here to come to their end."""
        self.write("enough")

    def tell(self, fifo: str) -> None:
        """Write a line into a named pipe here; returns when it is being read.

        Once for each pipe: a reader that opens it again may still meet this writer, and then its end.
        """
        self.nodes.sh(self.home, 'echo go >"$1"', f"{self.directory}/{fifo}", user=self.user)

    def lines(self, name: str) -> int:
        """How many lines a file here has."""
        return self.read(name).count("\n")

    def grows(self, name: str, by: int = 20) -> None:
        """Return when a file here has got `by` more lines."""
        goal = self.lines(name) + by
        until(lambda: self.lines(name) >= goal, f"{self.directory}/{name} has {goal} lines")

    def count(self, name: str = "out") -> Count:
        """What counter.py has said in a file here."""
        return Count.of(self.read(name))

    # ------------------------------------------------------------------ what the user does

    def shell(self, script: str, *, node: str = "") -> Shell:
        """Run a script with bash, in this directory."""
        command = ["bash", "-c", f'cd "$1" || exit 1\n{script}', "bash", self.directory]
        shell = Shell(self.nodes.popen(node or self.home, command, user=self.user))
        self.shells.append(shell)
        return shell

    def job(self, command: str) -> tuple[Shell, int]:
        """Run a command in the background of a shell that waits for it and tells its status.

        :return: the shell, and the pid of the job.
        """
        shell = self.shell(f'{command} &\necho "pid $!"\nwait $!\necho "status $?"')
        return shell, shell.pid()

    def migrate(self, *words: str, node: str = "", user: str = "", check: bool = False) -> Result:
        """Run `migrate` with these words."""
        return self.nodes.exec(
            node or self.home, ["migrate", *words], user=user or self.user, check=check
        )

    def move(self, pid: int, host: str) -> None:
        """Move a process, and see that it runs there then."""
        self.migrate("-p", str(pid), "-h", host, check=True)
        assert guests_at(self.nodes, host) == {pid}

    def send(self, pid: int, signal: str) -> None:
        """kill -SIGNAL PID, at home."""
        self.nodes.exec(self.home, ["kill", f"-{signal}", str(pid)], user=self.user)

    def ids(self, pid: int) -> str:
        """ "PID PPID PGID SID" of a process at home, as ps tells it."""
        told = self.nodes.exec(
            self.home, ["ps", "-o", "pid=,ppid=,pgid=,sid=", "-p", str(pid)], user=self.user
        )
        return " ".join(told.stdout.split())

    def state(self, pid: int) -> str:
        """The state of a process at home, one letter as in ps; "" if there is none."""
        return process_state(self.nodes, self.home, pid)


# ---------------------------------------------------------------------- what is where


def process_state(nodes: Nodes, node: str, pid: int) -> str:
    """The state of a process, one letter as in ps; "" if there is none."""
    with suppress(OSError):
        return (_proc(nodes, node) / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    return ""


def guest_trees(nodes: Nodes, node: str) -> dict[int, Path]:
    """The cgroups of the guests on a node that have a process, by their pids at home."""
    found = {}
    for tree in (nodes.node(node).cgroup / SLICE).glob("keeper-*/tree"):
        with suppress(OSError):  # it may be removed just now
            if (tree / "cgroup.procs").read_text():
                found[int(tree.parent.name.split("-")[1])] = tree
    return found


def guests_at(nodes: Nodes, node: str) -> set[int]:
    """The guests that run on a node, by their pids at home."""
    return set(guest_trees(nodes, node))


def guest_pids(nodes: Nodes, node: str, pid: int) -> list[int]:
    """The processes of a guest, as the node counts."""
    # cgroup.procs tells the reader's own pids: so it is read in the node.
    script = 'cat /sys/fs/cgroup/"$1"/keeper-"$2"-*/tree/cgroup.procs'
    return [int(word) for word in nodes.sh(node, script, SLICE, str(pid)).split()]


def told_to_freeze(nodes: Nodes, node: str, pid: int) -> bool:
    """Whether a guest's cgroup is to stand still. (One that waits for its files never says that it
    does, but uses no CPU either.)"""
    return (guest_trees(nodes, node)[pid] / "cgroup.freeze").read_text() == "1\n"


def agent_pids(nodes: Nodes, node: str, role: str) -> list[int]:
    """The guards or keepers on a node, as it counts."""
    return [
        int(process.name)
        for process in _proc(nodes, node).glob("[0-9]*")
        if f"agent.{role}" in _command(process)
    ]


def leftovers(nodes: Nodes) -> list[str]:
    """Everything on the nodes that was there for guests; [] when all have ended and nothing is left."""
    return [thing for node in nodes.names for thing in _leftovers(nodes, node)]


def _leftovers(nodes: Nodes, node: str) -> Iterator[str]:
    init = nodes.node(node).pid_or_error()
    for process in _proc(nodes, node).glob("[0-9]*"):
        command = _command(process)
        if OURS.search(command):
            yield f"{node}: process {process.name}: {command}"
    for line in Path(f"/proc/{init}/mounts").read_text().splitlines():
        mount = line.split()[1]
        if mount.startswith("/run/migrate/") and mount != "/run/migrate/proc":
            yield f"{node}: mount {line}"
    for directory in (nodes.node(node).cgroup / SLICE).glob("*/"):
        yield f"{node}: cgroup {directory.name}"
    for kind in ("guests", "deputies"):
        for path in Path(f"/proc/{init}/root/run/migrate/{kind}").glob("*"):
            yield f"{node}: /run/migrate/{kind}/{path.name}"


def sweep(nodes: Nodes) -> None:
    """After a test that failed: kill every guest, and those who look after them; migd removes the rest."""
    for node in nodes.names:
        for tree in (nodes.node(node).cgroup / SLICE).glob("*/"):
            with suppress(FileNotFoundError):
                (tree / "cgroup.kill").write_text("1")


def _proc(nodes: Nodes, node: str) -> Path:
    return Path(f"/proc/{nodes.node(node).pid_or_error()}/root/proc")


def _command(process: Path) -> str:
    """Its command line; of a zombie its name. "" if it has just ended."""
    with suppress(OSError):
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return words or (process / "comm").read_text()
    return ""


def answer(desk: Desk, number: int, question: str) -> dict[str, object]:
    """What reporter.py answers to a question that is asked now."""
    desk.write(f"ask.{number}", question)
    until(lambda: desk.read(f"answer.{number}"), f"answer.{number} is there")
    found = json.loads(desk.read(f"answer.{number}"))
    assert isinstance(found, dict)
    return found
