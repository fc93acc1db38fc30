"""The keeper's part in `migrate COMMAND`: execute it in a capsule that stands, as its owner.

It is born with the deputy's pid, in a session and group of the same numbers as at home.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from agent import syscalls
from agent.capsule import Capsule
from agent.cgroups import Cgroup
from agent.execution import Failure, execute
from agent.guestwords import Begin
from agent.limits import stricter
from agent.link import Offer, StreamPipe
from agent.reactor import READ, Reactor
from agent.session import spawn_in_session
from agent.terminal import FarTerminal
from agent.waiting import wait_for
from agent.wire import nothing
from migrate.command_wire import Command
from migrate.errors import HostError, MigrateError

EXEC_SECONDS = 60.0
"""The file may have to come from home."""
OUTPUT_BYTES = 1 << 20
"""In a command's pipe. Its input is smaller than a window: only of a full pipe is known at once when it
is read."""
LOWEST_NICE = 19
_JOINED = b"."
_STDIO = (0, 1, 2)
_ALL_FDS = (1 << 31) - 1
_decode_failure = msgspec.msgpack.Decoder(Failure).decode


class NotExecuted(MigrateError):
    """The command will not be executed; `status` is what `migrate` exits with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.what, failure.reason)
        self.status = failure.status


@dataclass
class Running:
    """What the keeper of a command that runs must look after."""

    pipes: dict[int, StreamPipe] = field(default_factory=dict)
    """by stream"""
    fds: dict[int, int] = field(default_factory=dict)
    """stream → our end"""


class CommandStart:
    """One attempt to execute one command."""

    def __init__(
        self,
        reactor: Reactor,
        offer: Offer,
        capsule: Capsule,
        tree: Cgroup,
        terminal: FarTerminal | None,
    ) -> None:
        """:param terminal: the controlling one of the command's session."""
        self._reactor = reactor
        self._terminal = terminal
        self._offer = offer
        self._capsule = capsule
        self._tree = tree

    def run(self, begin: Begin, command: Command) -> Running:
        """Execute it; what it becomes is a child of this process.

        :raises NotExecuted: it is not there, or no program.
        :raises MigrateError, OSError: it could not even be tried.
        """
        self._tree.create()
        running = Running()
        theirs: dict[int, int] = {}
        cgroup = os.open(self._tree.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        reading, writing = os.pipe()
        holders: tuple[int, ...] = ()
        try:
            for pipe in begin.pipes:
                listed, ours, end = self._make_pipe(pipe.stream, pipe.outgoing)
                running.pipes[pipe.stream], running.fds[pipe.stream] = listed, ours
                theirs.update(dict.fromkeys(pipe.numbers, end))
            child = _Child(
                self._offer, self._capsule, begin, command, theirs, writing, self._terminal
            )

            def spawn(fork: Callable[[], int]) -> int:
                pid = fork()
                if pid == 0:
                    child.become()
                return pid

            ids = self._offer.ids
            lead = self._terminal.lead if self._terminal is not None else nothing
            _, holders = spawn_in_session(ids, spawn, self._reactor, ids.pid, cgroup, lead)
            if self._terminal is not None:
                holders = ()  # with the leader of its session the terminal would be hung up
            os.close(writing)
            writing = -1
            self._await_word(reading)
            _bury(holders)
            holders = ()
            self._await_exec(reading)
        except BaseException:
            _close(running.fds.values())
            raise
        finally:
            _close({cgroup, reading, *theirs.values()} | ({writing} if writing >= 0 else set()))
            _bury(holders)
        return running

    def _make_pipe(self, stream: int, outgoing: bool) -> tuple[StreamPipe, int, int]:
        """:returns: how it is listed for the next hop, our end, the command's end."""
        reading, writing = os.pipe()
        if outgoing:
            with contextlib.suppress(OSError):
                fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, OUTPUT_BYTES)
        # It may open its end again through /proc, as /dev/stdout.
        os.fchown(reading, self._offer.owner.uid, self._offer.owner.gid)
        size = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
        key = f"pipe:[{os.fstat(reading).st_ino}]"
        listed = StreamPipe(stream, key, outgoing, size)
        return (listed, reading, writing) if outgoing else (listed, writing, reading)

    def _await_word(self, reading: int) -> None:
        """The first is that the child is in its session and group."""
        if not wait_for(self._reactor, reading, READ, EXEC_SECONDS) or not os.read(reading, 1):
            self._tree.kill()
            raise HostError("command", "its process could not be made")

    def _await_exec(self, reading: int) -> None:
        """The pipe closes at the exec; what comes before is why there was none."""
        if not wait_for(self._reactor, reading, READ, EXEC_SECONDS):
            self._tree.kill()
            raise HostError("command", "could not be executed in time")
        if told := os.read(reading, 1 << 16):
            raise NotExecuted(_decode_failure(told))


class _Child:
    """In the new process: everything between fork and exec."""

    def __init__(
        self,
        offer: Offer,
        capsule: Capsule,
        begin: Begin,
        command: Command,
        stdio: dict[int, int],
        report: int,
        terminal: FarTerminal | None,
    ) -> None:
        self._offer = offer
        self._capsule = capsule
        self._begin = begin
        self._command = command
        self._stdio = stdio
        self._report = report
        self._terminal = terminal

    def become(self) -> NoReturn:
        """The command; or tell why not, and end."""
        failure = Failure(125, "command", "could not be started")
        try:
            failure = self._try()
        except OSError as error:
            failure = Failure(125, "command", f"could not be started: {error}")
        finally:
            with contextlib.suppress(OSError):
                os.write(self._report, msgspec.msgpack.encode(failure))
            os._exit(failure.status)

    def _try(self) -> Failure:
        ids, owner, begin = self._offer.ids, self._offer.owner, self._begin
        self._reset_signals()
        if ids.sid == ids.pid:
            os.setsid()
            if self._terminal is not None:
                self._terminal.lead()
        elif ids.pgid == ids.pid:
            os.setpgid(0, 0)
        os.write(self._report, _JOINED)
        if self._terminal is not None and begin.terminal is not None and begin.terminal.in_front:
            self._terminal.set_foreground(os.getpgrp())
        self._capsule.enter()
        self._take_stdio()
        if begin.low:
            syscalls.set_idle_io_priority()
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        # A user's nice value can only be worse than everybody's.
        nice = LOWEST_NICE if begin.low else max(0, begin.nice)
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        self._limit()
        os.setgroups(owner.groups)
        os.setresgid(owner.gid, owner.gid, owner.gid)
        os.setresuid(owner.uid, owner.uid, owner.uid)
        os.umask(begin.umask)
        try:
            os.chdir(begin.cwd)
        except OSError as error:
            return Failure(125, begin.cwd, f"not to be entered: {error.strerror}")
        environment = {
            name: value
            for name, equals, value in (e.partition(b"=") for e in self._command.environment)
            if equals
        }
        environment[b"MIGRATE_HOST"] = begin.host.encode()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return execute(self._command.file, self._command.arguments, environment)

    def _take_stdio(self) -> None:
        """Descriptors 0 to 2, and no others but the report, which exec closes."""
        high = {number: fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for number, fd in self._stdio.items()}
        for device in self._begin.devices:
            high[device.number] = fcntl.fcntl(
                os.open(device.path, device.flags | os.O_NOCTTY), fcntl.F_DUPFD, 10
            )
        if self._terminal is not None and self._begin.terminal is not None:
            # Opened in here: its name is then one that the command can find.
            fd = os.open(self._terminal.path, os.O_RDWR | os.O_NOCTTY)
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD, 10)
            high.update(dict.fromkeys(self._begin.terminal.numbers, copy))
        self._report = fcntl.fcntl(self._report, fcntl.F_DUPFD_CLOEXEC, 10)
        for number in _STDIO:
            if number in high:
                os.dup2(high[number], number)
        os.closerange(3, self._report)
        os.closerange(self._report + 1, _ALL_FDS)

    def _limit(self) -> None:
        """Home's limits, as far as this host's own allow."""
        for limit in self._begin.limits:
            with contextlib.suppress(ValueError, OSError):
                _, most = resource.getrlimit(limit.resource)
                hard = stricter(limit.hard, most)
                resource.setrlimit(limit.resource, (stricter(limit.soft, hard), hard))

    def _reset_signals(self) -> None:
        """Those for the command wait until it is executed."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signal.set_wakeup_fd(-1)
        ignored = set(self._command.ignored_signals)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                action = signal.SIG_IGN if number in ignored else signal.SIG_DFL
                signal.signal(number, action)


def _bury(processes: Iterable[int]) -> None:
    for pid in processes:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _close(fds: Iterable[int]) -> None:
    for fd in set(fds):
        os.close(fd)
