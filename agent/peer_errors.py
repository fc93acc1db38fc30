"""What can go wrong between two hosts: before the peer was asked anything, or after."""

from migrate.errors import PeerError


class PeerUnreachable(PeerError):
    """There is no connection: nothing was asked of the peer, and nothing happened there."""


class AnswerLost(PeerError):
    """The peer was asked, and its answer does not come: it may or may not have acted."""


class ConnectionCut(AnswerLost):
    """The connection ended under the question; it may have been dead for long."""


def one_line(text: str, limit: int = 200) -> str:
    """Text from a peer, fit for a user's terminal: one line, printable, not too long."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
