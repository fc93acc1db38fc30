"""A criu that waits for the images it is to restore: started before anything freezes.

Its descriptors, session and pid must be right when it starts, so they are made after what the source
plans to send. If that was another tree than the one that came, a second criu is started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.cgroups import Cgroup
from agent.link import Owner, StreamPipe, TreeIds
from agent.reactor import Reactor
from agent.session import spawn_in_session
from agent.terminal import FarTerminal
from criu_hooks.calls import CriuCall, InheritFd, spawn_swrk
from migrate.errors import PeerError

PIDS_AT_ONCE = 64
"""How many pids from its own on criu may use for its helpers."""


@dataclass
class GuestPipe:
    """A pipe of the guest that leads home, and our end of it."""

    listed: StreamPipe
    our_fd: int


class Restorer:
    """One criu. A context manager: what was made for it is given back at the end of the block, and
    criu is killed if the block fails."""

    def __init__(
        self,
        reactor: Reactor,
        call: CriuCall,
        ids: TreeIds,
        owner: Owner,
        enter: Callable[[], None],
        planned: Iterable[StreamPipe],
        tids: Iterable[int],
        terminal: FarTerminal | None = None,
        controlling: bool = False,
    ) -> None:
        """Start it.

        :param enter: runs in the child that becomes criu: enter the capsule.
        :param planned: the pipes it is to connect the guest with.
        :param tids: which the guest needs, as criu will count.
        :param terminal: in place of home's, of which there may be two files: the other is /dev/tty.
        :param controlling: it is the terminal of the guest's session.
        """
        self.pid = 0
        self.pipes: list[GuestPipe] = []
        self._call = call
        self._holders: tuple[int, ...] = ()
        self._guest_fds: dict[str, int] = {}
        self._terminal = terminal
        self._controlling = controlling and terminal is not None
        self._terminal_fds = [os.dup(terminal.slave) for _ in range(2)] if terminal else []
        try:
            for listed in planned:
                self._make_pipe(listed, owner)
            self._first_pid = _avoid(frozenset(tids))
            criu_end, fds = call.criu_end, [*self._guest_fds.values(), *self._terminal_fds]
            self.pid, self._holders = spawn_in_session(
                ids,
                lambda fork: spawn_swrk(criu_end, fds, partial(self._enter, enter), fork),
                reactor,
                lead=self._lead,
            )
        except BaseException:
            self._close(kill=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(kill=error is not None)

    def suits(self, pipes: Iterable[StreamPipe], tids: Iterable[int]) -> bool:
        """Whether it can restore what has come."""
        wanted = {(pipe.stream, pipe.key, pipe.outgoing) for pipe in pipes}
        made = {(p.listed.stream, p.listed.key, p.listed.outgoing) for p in self.pipes}
        mine = range(self._first_pid, self._first_pid + PIDS_AT_ONCE)
        return wanted == made and not any(tid in mine for tid in tids)

    def inherited(self, terminal_keys: Sequence[str]) -> tuple[InheritFd, ...]:
        """What stands for the guest's pipes and terminal in criu.

        :raises PeerError: more terminals than were offered.
        """
        if len(terminal_keys) > len(self._terminal_fds):
            raise PeerError("terminal", "it was not in the offer")
        fds = [*self._guest_fds.items(), *zip(terminal_keys, self._terminal_fds, strict=False)]
        return tuple(InheritFd(key, fd) for key, fd in fds)

    def set_sizes(self, pipes: Iterable[StreamPipe]) -> None:
        """Give the pipes the room that they had at home."""
        sizes = {pipe.stream: pipe.size_bytes for pipe in pipes}
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.our_fd, fcntl.F_SETPIPE_SZ, sizes[pipe.listed.stream])

    def discard(self) -> None:
        """Kill it: it does not suit."""
        self._close(kill=True)

    def leave(self, elsewhere: Cgroup) -> None:
        """Move criu out of the guest's cgroup, once the guest's root has been forked."""
        elsewhere.add(self.pid)

    def _enter(self, enter: Callable[[], None]) -> None:
        enter()
        if self._terminal is not None:
            for number in self._terminal_fds:
                # Opened in there: its name is then one that the guest can find.
                fd = os.open(self._terminal.path, os.O_RDWR | os.O_NOCTTY)
                os.dup2(fd, number)
                os.close(fd)

    def _lead(self) -> None:
        if self._terminal is not None and self._controlling:
            self._terminal.lead()

    def _make_pipe(self, listed: StreamPipe, owner: Owner) -> None:
        reading, writing = os.pipe()
        # criu opens its end again through /proc, as the owner's process could
        os.fchown(reading, owner.uid, owner.gid)
        ours, theirs = (reading, writing) if listed.outgoing else (writing, reading)
        self.pipes.append(GuestPipe(listed, ours))
        self._guest_fds[listed.key] = theirs

    def _close(self, *, kill: bool) -> None:
        if kill:
            for pipe in self.pipes:
                os.close(pipe.our_fd)
            self.pipes.clear()
            if self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(self.pid, 0)
                self.pid = 0
            self._call.renew()
        for fd in (*self._guest_fds.values(), *self._terminal_fds):
            os.close(fd)
        self._guest_fds.clear()
        self._terminal_fds.clear()
        if self._controlling and not kill:
            return  # with the leader of its session the terminal would be hung up
        for holder in self._holders:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
        self._holders = ()


def _avoid(tids: frozenset[int]) -> int:
    """Have the next process here born under a pid that is none of these, nor those after it."""
    first = next(n for n in range(300, 30000, 100) if not tids & set(range(n, n + PIDS_AT_ONCE)))
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(first))
    return first
