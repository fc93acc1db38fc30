"""A user's terminal on a node: a real pseudo-terminal with bash in it, driven as by hand."""

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from moving import PATIENCE_SECONDS, Desk

PROMPT = "ready> "
KEYS = {"^C": b"\3", "^D": b"\4", "^Z": b"\x1a", "Esc": b"\x1b", "Backspace": b"\x7f"}


class Terminal:
    """What a user sees and types; `seen` is everything since the last `expect`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._keyboard = process.stdin
        self._screen = process.stdout.fileno()
        self.seen = b""
        self.log = b""

    def keys(self, text: str) -> None:
        """Keys, as they come from the keyboard: Enter is a carriage return."""
        self._keyboard.write(text.replace("\n", "\r").encode())
        self._keyboard.flush()

    def press(self, key: str) -> None:
        """One of KEYS."""
        self._keyboard.write(KEYS[key])
        self._keyboard.flush()

    def expect(self, pattern: str, seconds: float = PATIENCE_SECONDS) -> re.Match[bytes]:
        """Wait until this is seen; what comes after it stays in `seen`."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern.encode(), self.seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"no {pattern!r} in {self.seen!r}"
        self.seen = self.seen[found.end() :]
        return found

    def prompt(self) -> None:
        """Wait for the shell's prompt."""
        self.expect(PROMPT)

    def run(self, command: str) -> str:
        """Type a command at the prompt; :return: what it says until the next prompt."""
        self.keys(command + "\n")
        self.expect(r"\r\n")
        found = self.expect(rf"(?s)(.*?){PROMPT}")
        return found[1].decode().replace("\r\n", "\n")

    def ends(self) -> None:
        """Wait until the terminal is closed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._read(deadline - time.monotonic()):
            pass

    def close(self) -> None:
        """The user closes the window."""
        self._keyboard.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, seconds: float) -> bool:
        """:return: False at the end, or after so long."""
        ready, _, _ = select.select([self._screen], [], [], max(0.0, seconds))
        data = os.read(self._screen, 1 << 16) if ready else b""
        self.seen += data
        self.log += data
        return bool(data)


@contextmanager
def terminal(desk: Desk) -> Iterator[Terminal]:
    """An interactive bash of the user's in her directory, without her start-up files."""
    command = ["env", f"PS1={PROMPT}", "TERM=xterm", "bash", "--norc", "--noediting", "-i"]
    script = f"cd {desk.directory} && stty rows 24 cols 80 && exec " + " ".join(
        f"'{word}'" for word in command
    )
    process = desk.nodes.popen(
        desk.home,
        ["sh", "-c", script],
        user=desk.user,
        tty=True,
        stdin=subprocess.PIPE,
    )
    with Terminal(process) as made:
        made.prompt()
        yield made
