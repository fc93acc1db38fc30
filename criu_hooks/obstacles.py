"""Why a process tree can not move: one typed reason each, and what a user is told of it."""

from __future__ import annotations

from dataclasses import dataclass

from criu_hooks.fds import OpenFile
from criu_hooks.tree import Process
from migrate.errors import MigrateError, UserError


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One reason why a tree can not move."""

    subject: str
    """the process, and which of its files"""
    reason: str
    remedy: str
    passing: bool = False
    """over by itself within a moment: worth another look"""

    def __str__(self) -> str:
        """One line: `what: reason; remedy`."""
        return str(self.error())

    def error(self) -> UserError:
        """The same as an exception."""
        return UserError(self.subject, self.reason, self.remedy)


@dataclass(frozen=True, slots=True)
class Note:
    """Something that does not stop a move, but that its user should know."""

    subject: str
    text: str

    def __str__(self) -> str:
        return str(MigrateError(self.subject, self.text))


def printable(text: str) -> str:
    """Names chosen by others, safe for one line on a terminal: control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def process_subject(process: Process) -> str:
    """How messages name a process."""
    return f"pid {process.pid} ({printable(process.comm)})"


def file_subject(process: Process, file: OpenFile) -> str:
    """How messages name an open file."""
    return f"{process_subject(process)}, fd {file.fd} {printable(file.link)}"
