"""`migrate -p PID`: asks migd to move processes, and tells how that goes."""

from __future__ import annotations

import io
import sys
from time import monotonic

from migrate import client, messages
from migrate.errors import MigrateError
from migrate.pids import format_pid

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    from collections.abc import Sequence


class Moves:
    """What the command line says about processes to move."""

    def __init__(
        self,
        pids: Sequence[int],
        host: str = "",
        host_id: int = 0,
        check: bool = False,
        verbose: bool = False,
        debug: bool = False,
    ) -> None:
        """
        :param host: where to, by name; empty: one is chosen, unless `host_id` names it.
        :param check: only tell what is in the way.
        """
        self.pids = tuple(pids)
        self.host = host
        self.host_id = host_id
        self.check = check
        self.verbose = verbose
        self.debug = debug


def move(moves: Moves) -> bool:
    """Move them one after the other; False if one of them did not move: why is on stderr.

    :raises HostError: migd cannot be reached, or was lost.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every locale has an arrow
    good = True
    for pid in moves.pids:
        request = messages.Move(pid, moves.host, moves.host_id, moves.check)
        good = _move_one(pid, request, moves.verbose, moves.debug) and good
    return good


class _Reporter:
    """What a user sees of one migration."""

    def __init__(self, pid: int, verbose: bool, debug: bool) -> None:
        self._pid = pid
        self._verbose = verbose
        self._debug = debug
        self._line = sys.stderr.isatty() and sys.stdout.isatty()
        self._shown = False
        self._since: float | None = None

    def progress(self, progress: messages.Progress) -> None:
        now = monotonic()
        self._since = self._since or now
        if self._debug:
            print(
                f"{format_pid(self._pid)}: {progress.step} ({progress.sent_bytes} bytes, "
                f"{progress.at_ms:.1f} ms after the freeze)",
                file=sys.stderr,
            )
        elif self._line and progress.sent_bytes:
            text = f"\r{format_pid(self._pid)}: {progress.sent_bytes / (1 << 20):.0f} MiB"
            if now > self._since:
                text += f", {progress.sent_bytes / 1e6 / (now - self._since):.0f} MB/s"
            print(text, end="\033[K", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def moved(self, moved: messages.Moved) -> None:
        if sys.stdout.isatty() or self._verbose:
            mebibytes = moved.sent_bytes / (1 << 20)
            print(
                f"{format_pid(moved.pid)} → {moved.host}  "
                f"(frozen {moved.frozen_ms:.0f} ms, {mebibytes:.0f} MiB)"
            )
        if self._verbose:
            for note in moved.notes:
                print(f"migrate: {note}", file=sys.stderr)


def _move_one(pid: int, request: messages.Move, verbose: bool, debug: bool) -> bool:
    reporter = _Reporter(pid, verbose, debug)
    for reply in client.ask(request):
        match reply:
            case messages.Progress():
                reporter.progress(reply)
            case messages.Moved():
                reporter.clear()
                reporter.moved(reply)
            case messages.Checked():
                print(f"{format_pid(pid)} can move")
                for note in reply.notes:
                    print(f"migrate: {note}", file=sys.stderr)
            case messages.Refused():
                reporter.clear()
                for obstacle in reply.obstacles:
                    error = MigrateError(obstacle.what, obstacle.reason, obstacle.remedy)
                    print(f"migrate: {error}", file=sys.stderr)
                return False
    return True
