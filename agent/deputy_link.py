"""The guard's end of its connection with the deputy. The protocol stands in agent/deputy.py.

Everything here is for an event loop: `fileno` gives what to poll for reading, nothing blocks.
"""

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_LINE_LIMIT = 4096
_BACKLOG = 4
_MODE_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Ready:
    """The deputy is connected; also after a reconnection."""


@dataclass(frozen=True)
class Signalled:
    """A signal arrived at the deputy and is meant for the guest."""

    number: int
    value: int | None = None
    """What sigqueue(3) gave with it, 64 bits unsigned."""
    group: bool = False
    """It was sent to the whole process group, as a terminal does."""


@dataclass(frozen=True)
class Continued:
    """The deputy goes on after a `stop`: so shall the guest (SIGCONT)."""


@dataclass(frozen=True)
class Held:
    """Signals now stay pending at the deputy."""


@dataclass(frozen=True)
class Gone:
    """The deputy is about to end as it was told."""


@dataclass(frozen=True)
class Broken:
    """The connection ended: the deputy is dead (look at its pidfd) or will connect again."""


Report = Ready | Signalled | Continued | Held | Gone | Broken
_PLAIN: dict[str, Report] = {
    "READY": Ready(),
    "CONT": Continued(),
    "HELD": Held(),
    "GONE": Gone(),
}


class DeputyLink:
    """One connection with one deputy."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._input = b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def receive(self) -> list[Report]:
        """What the deputy has said since the last call; it ends in `Broken` when the link does.

        Signals returned here count as dealt with: the deputy does not report them again.
        """
        try:
            data = self._connection.recv(_LINE_LIMIT)
        except BlockingIOError:
            return []
        except OSError:
            return [Broken()]
        if not data:
            return [Broken()]
        *lines, self._input = (self._input + data).split(b"\n")
        if len(self._input) > _LINE_LIMIT:
            return [Broken()]
        reports = [report for report in map(_parse, lines) if report is not None]
        signals = sum(isinstance(report, Signalled) for report in reports)
        if signals:
            self._send(f"GOT {signals}")
        return reports

    def stop(self, number: int) -> None:
        """The guest was stopped by this signal: the deputy's parent shall see the same."""
        self._send(f"STOP {number}")

    def end(self, exit_code: int) -> None:
        """The guest ended: 0 to 255, or minus the signal (`os.waitstatus_to_exitcode`)."""
        self._send(f"EXIT {exit_code}" if exit_code >= 0 else f"KILLED {-exit_code}")

    def close_descriptor(self, fd: int) -> None:
        """The guest closed this one of the descriptors that the deputy keeps."""
        self._send(f"CLOSE {fd}")

    def hold(self) -> None:
        """Leave signals pending until `free`; `Held` answers."""
        self._send("HOLD")

    def free(self) -> None:
        """Report signals again."""
        self._send("FREE")

    def _send(self, line: str) -> None:
        # A deputy reads at once, so a full buffer (100 kB of such lines) is a dead one's: then as
        # for a broken connection `receive` is the place where it shows.
        data = line.encode("ascii") + b"\n"
        try:
            if self._connection.send(data, socket.MSG_NOSIGNAL) != len(data):
                self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)


class DeputyListener:
    """The socket at which a guard awaits its deputy. Use as a context manager."""

    def __init__(self, path: Path, pid: int, uid: int, gid: int) -> None:
        """Listen.

        :param path: in a directory that only root can write and the deputy's user can pass.
        :param pid: the deputy's, the only one whose connection is taken.
        :param uid: of the deputy's user, who becomes the owner of the socket.
        """
        self._path = path
        self._pid = pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            path.chmod(_MODE_OWNER_ONLY)
            os.chown(path, uid, gid, follow_symlinks=False)
            self._socket.setblocking(False)
            self._socket.listen(_BACKLOG)
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> DeputyLink | None:
        """The deputy's connection; None if there is none yet or somebody else knocked."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        if _peer_pid(connection) != self._pid:
            connection.close()
            return None
        return DeputyLink(connection)

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


def process_state(pid: int) -> str | None:
    """The letter of /proc/PID/stat (proc(5)): T stopped, t traced, Z zombie…; None if gone.

    This shows the SIGSTOP that a deputy cannot report.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name before may contain anything, also a parenthesis.
    return chr(text[text.rindex(b")") + 2])


def _peer_pid(connection: socket.socket) -> int:
    credentials = struct.Struct("3i")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return int(credentials.unpack(data)[0])


def _parse(line: bytes) -> Report | None:
    """A report, or None for what is not one: a user can run anything in the deputy's place."""
    word, *rest = line.decode("ascii", "replace").split()[:3] or [""]
    if word not in ("SIG", "GROUP"):
        return _PLAIN.get(word)
    try:
        number, *value = map(int, rest)
    except ValueError:
        return None
    if not 1 <= number <= 64 or not all(0 <= word < 1 << 64 for word in value):
        return None
    if word == "GROUP":
        return None if value else Signalled(number, group=True)
    return Signalled(number, value[0] if value else None)
