"""The testbed as tests use it: the words of the command line as typed methods."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from testbed.lifecycle import Testbed
from testbed.network import Switch
from testbed.node import Node

Stream = int | IO[bytes] | None


@dataclass(frozen=True)
class Result:
    """How a command in a node ended. `status`: 128 + n if signal n ended it."""

    status: int
    stdout: str
    stderr: str


class CommandFailed(AssertionError):
    """A command that a test relied on ended with another status than 0."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a testbed; a node is named "node1", "node2", …"""

    testbed: Testbed = field(default_factory=Testbed)

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.testbed.nodes()]

    def node(self, name: str) -> Node:
        """:raises TestbedError: if there is no such node."""
        return self.testbed.node(name)

    def exec(
        self,
        node: str,
        command: Sequence[str],
        *,
        user: str = "root",
        stdin: str = "",
        check: bool = True,
        timeout_seconds: float = 60.0,
    ) -> Result:
        """Run a command and wait for it.

        :raises CommandFailed: if `check` is set and its status is not 0.
        :raises subprocess.TimeoutExpired: after `timeout_seconds`; the command may still run.
        """
        done = subprocess.run(
            exec_command(self.testbed, node, command, user=user),
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout_seconds,
        )
        stdout, stderr = (data.decode(errors="replace") for data in (done.stdout, done.stderr))
        result = Result(done.returncode, stdout, stderr)
        if check and result.status != 0:
            words = " ".join(command)
            raise CommandFailed(
                f"{node}: `{words}` ended with {result.status}\n{result.stdout}{result.stderr}"
            )
        return result

    def sh(
        self,
        node: str,
        script: str,
        *arguments: str,
        user: str = "root",
        check: bool = True,
        timeout_seconds: float = 60.0,
    ) -> str:
        """Run a shell script with arguments $1, … :return: its output without the last newline."""
        command = ["sh", "-c", script, "sh", *arguments]
        result = self.exec(node, command, user=user, check=check, timeout_seconds=timeout_seconds)
        return result.stdout.removesuffix("\n")

    def popen(
        self,
        node: str,
        command: Sequence[str],
        *,
        user: str = "root",
        tty: bool = False,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = subprocess.PIPE,
        stderr: Stream = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """Start a command.

        Signals sent to the Popen reach the command's process group, but kill() only this side.
        """
        return subprocess.Popen(
            exec_command(self.testbed, node, command, user=user, tty=tty),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    def cut(self, node: str) -> None:
        """Let packets from and to the node get lost."""
        Switch(self.testbed.instance).cut(self.node(node).name)

    def heal(self, node: str) -> None:
        """Undo `cut`."""
        Switch(self.testbed.instance).heal(self.node(node).name)

    def kill(self, node: str) -> None:
        """Switch the node off at once."""
        self._word("kill", node)

    def boot(self, node: str) -> None:
        """Switch it on again; returns when its services are ready."""
        self._word("boot", node)

    def logs(self, node: str) -> str:
        """What migd has logged on the node."""
        return self.node(node).service_log("migd")

    def restart_migd(self, node: str) -> None:
        """Restart migd as systemctl would; returns when it is ready again."""
        self.node(node).restart_service("migd")

    def crash_migd(self, node: str) -> None:
        """Kill migd with SIGKILL; returns when the next one is ready."""
        self.node(node).crash_service("migd")

    def wait_for_migd(self, node: str) -> None:
        """Return when migd is ready."""
        self.node(node).wait_for_service("migd")

    def restore(self) -> None:
        """After a test: every node on and connected, nothing left of what ran there with `exec`."""
        for node in self.testbed.nodes():
            if node.init_pid is None:
                self.boot(node.name)
            node.end_users()
        for name, connected in Switch(self.testbed.instance).links().items():
            if not connected:
                self.heal(name)
        self.testbed.wait_until_ready()

    def _word(self, word: str, node: str) -> None:
        program = str(program_of(self.testbed))
        subprocess.run([sys.executable, "-IS", program, word, node], check=True)


def program_of(testbed: Testbed) -> Path:
    """The `nodes` program of the testbed's own checkout."""
    return testbed.instance.checkout / "tests/testbed/nodes"


def exec_command(
    testbed: Testbed, node: str, command: Sequence[str], *, user: str = "root", tty: bool = False
) -> list[str]:
    """The command line of the machine that runs `command` in a node."""
    own = [sys.executable, "-IS", str(program_of(testbed)), "exec", node, "--user", user]
    return [*own, *(["--tty"] if tty else []), "--", *command]
