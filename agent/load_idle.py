"""When somebody at this host last typed: terminals' access times and logind. Remote logins do not count.

Sources that a host lacks are left out silently. Terminals tell the time of the last input to 8 s.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# Consoles, serial lines, and the terminals that terminal emulators make.
_CONSOLE = re.compile(r"tty([1-9][0-9]?|S[0-9]+|USB[0-9]+|AMA[0-9]+)|hvc[0-9]+|console")
_REMOTE = re.compile(r"sshd(-session)?|in\.telnetd|telnetd|mosh-server|in\.rlogind|rlogind")
_GRAPHICAL = ("x11", "wayland", "mir")
_LOGINCTL_SECONDS = 2.0

Ask = Callable[[str], str]


def ask_logind(session: str) -> str:
    """What `loginctl` says about the idleness of a session; "" if it says nothing."""
    command = ["loginctl", "show-session", session, "-p", "IdleHint", "-p", "IdleSinceHint"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LOGINCTL_SECONDS,
            check=True,
        ).stdout
    return ""


@dataclass
class IdleWatch:
    """Finds the time of the last input. `root` stands for / in tests."""

    root: Path = Path("/")
    ask: Ask = ask_logind
    now: Callable[[], float] = time.time
    _remote: dict[tuple[str, float], bool] = field(default_factory=dict)
    """by terminal and the time it was made"""

    def idle_seconds(self, up_seconds: float) -> float:
        """Since the last input; since the boot if there was none."""
        now = self.now()
        # Times that lie ahead of the clock (it was set back) are taken for now.
        inputs = [min(at, now) for at in (*self._terminals(now - up_seconds), *self._sessions(now))]
        return min(up_seconds, now - max(inputs)) if inputs else up_seconds

    def _terminals(self, booted: float) -> Iterator[float]:
        newest = booted
        found = []
        for path in self._devices():
            with suppress(OSError):
                status = path.stat()
                if stat.S_ISCHR(status.st_mode):
                    found.append((status.st_atime, path, status))
        # Whether a terminal is remote is looked up only where it matters: from the newest on.
        for at, path, status in sorted(found, key=lambda item: item[0], reverse=True):
            if at <= newest:
                return
            if not self._is_remote(path, status):
                yield at
                return

    def _devices(self) -> Iterator[Path]:
        dev = self.root / "dev"
        with suppress(OSError):
            yield from (path for path in dev.iterdir() if _CONSOLE.fullmatch(path.name))
        with suppress(OSError):
            yield from (path for path in (dev / "pts").iterdir() if path.name.isdigit())

    def _is_remote(self, path: Path, status: os.stat_result) -> bool:
        if path.parent.name != "pts":
            return False
        key = (path.name, status.st_ctime)
        if key not in self._remote:
            if len(self._remote) > 256:
                self._remote.clear()
            self._remote[key] = self._served_remotely(status.st_rdev)
        return self._remote[key]

    def _served_remotely(self, device: int) -> bool:
        """Whether a process on this terminal descends from a server for remote logins."""
        proc = self.root / "proc"
        with suppress(OSError):
            for directory in proc.iterdir():
                if directory.name.isdigit():
                    fields = self._stat(int(directory.name))
                    if fields is not None and fields[2] == device:
                        return self._descends_from_server(int(directory.name))
        return False

    def _descends_from_server(self, pid: int) -> bool:
        for _ in range(64):
            fields = self._stat(pid)
            if fields is None:
                return False
            name, parent, _ = fields
            if _REMOTE.fullmatch(name):
                return True
            if parent <= 1:
                return False
            pid = parent
        return False

    def _stat(self, pid: int) -> tuple[str, int, int] | None:
        """Name, parent and terminal of a process."""
        with suppress(OSError, ValueError, IndexError):
            text = (self.root / "proc" / str(pid) / "stat").read_text(errors="replace")
            name = text[text.index("(") + 1 : text.rindex(")")]
            rest = text[text.rindex(")") + 2 :].split()
            return name, int(rest[1]), int(rest[4])
        return None

    def _sessions(self, now: float) -> Iterator[float]:
        """Graphical sessions: their terminals see nothing of keyboard and mouse."""
        with suppress(OSError):
            for path in (self.root / "run/systemd/sessions").iterdir():
                if path.suffix:
                    continue
                facts = _facts(path.read_text(errors="replace"))
                direct = facts.get("REMOTE") == "0" and facts.get("CLASS") == "user"
                if direct and facts.get("TYPE") in _GRAPHICAL:
                    told = _facts(self.ask(path.name))
                    if told.get("IdleHint") == "no":
                        yield now
                    elif told.get("IdleSinceHint", "").isdigit():
                        yield int(told["IdleSinceHint"]) / 1e6


def _facts(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {key: value for key, _, value in pairs}
