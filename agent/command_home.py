"""Home's side of `migrate COMMAND`: what the guard takes from the client that becomes the deputy."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import select
import socket
import stat
import termios
from collections.abc import Callable
from pathlib import Path

from agent import guestwords, syscalls
from agent.cgroups import of_process
from agent.endpoints import End, FdSink, FdSource, PeekSource
from agent.file_source import FileSource
from agent.fresh_tree import HomeFile
from agent.home_line import HomeLine
from agent.home_terminal import in_foreground, sharers
from agent.journal import Entry, Journal, Side, State
from agent.limits import parse_limits
from agent.link import StartCommand
from agent.reactor import READ, Reactor
from agent.terminal import TERMINAL_WINDOW
from agent.terminal_mode import Mode, Size
from agent.waiting import wait_until
from agent.wire import WINDOW
from criu_hooks.proc import ProcDir, parse_stat, parse_status
from migrate.command_wire import MAX_COMMAND_BYTES, Reply
from migrate.errors import HostError, MigrateError, PeerError, UserError

PREPARE_SECONDS = 40.0
LINE_BYTES = 512
_MEMORY_MAJOR = 1
_DEVICES = {3: "/dev/null", 5: "/dev/zero", 7: "/dev/full", 8: "/dev/random", 9: "/dev/urandom"}
_OWN_TERMINAL = (5, 0)
"""/dev/tty"""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND

Source = PeekSource | FdSource | FileSource


class CommandHome:
    """The client of one command, from its request until it stands as deputy; then its descriptors."""

    def __init__(self, reactor: Reactor, start: StartCommand, fds: list[int]) -> None:
        """:param fds: the client's socket, its command, its stdio; owned from now on."""
        self.pid = start.offer.ids.pid
        self.files: list[HomeFile] = []
        self.sinks: list[FdSink] = []
        self.sources: list[Source] = []
        self._reactor = reactor
        self._start = start
        self._client = socket.socket(fileno=fds[0])
        self._command_fd, *self._stdio = fds[1:]
        self._complaints = os.dup(self._stdio[2])
        self._word: guestwords.Prepared | guestwords.NotStarted | None = None
        self._client_gone = False
        self._pipes: list[guestwords.CommandPipe] = []
        self._devices: list[guestwords.CommandDevice] = []
        self._terminal_fd = -1
        self._terminal_numbers: list[int] = []
        self.in_front = False
        """it had the terminal when it began"""
        reactor.register(self._client.fileno(), READ, self._client_stirs)

    # ------------------------------------------------------------------ before the start

    def prepare(self, line: HomeLine) -> None:
        """Send the command along, and wait until its capsule stands.

        :raises MigrateError: it will not be executed.
        """
        self._progress("the guard stands")
        stream = line.lifeline.open(guestwords.COMMAND_STREAM)
        stream.sender.write(self._read_command())
        stream.sender.finish()
        self._lay_out(line)
        connected = wait_until(
            self._reactor, lambda: line.lifeline.up or self._over(), PREPARE_SECONDS
        )
        if connected and line.lifeline.up:
            self._progress("connected with the keeper")
        done = wait_until(self._reactor, self._over, PREPARE_SECONDS)
        match self._word:
            case guestwords.NotStarted(_, what, reason, remedy):
                raise PeerError(what, reason, remedy)
            case None if self._client_gone:
                raise UserError("migrate", "was ended before its command began")
            case None if not done:
                raise PeerError(f"host {self._start.destination}", "did not get ready in time")
        self._progress("the capsule stands")

    def _over(self) -> bool:
        return self._word is not None or self._client_gone

    def heard(self, word: guestwords.Prepared | guestwords.NotStarted) -> None:
        """What the keeper says before the command runs."""
        self._word = word

    def begin(
        self,
        line: HomeLine,
        journal: Journal,
        deputy_socket: Path,
        program: Path,
        on_closed: Callable[[list[int]], None],
    ) -> None:
        """From here on the command counts as started: journal it, and have it executed.

        :param on_closed: gets the deputy's descriptors that the command is done with.
        :raises OSError: the client has ended.
        """
        with ProcDir(self.pid) as proc:
            status = parse_status(proc.read("status"))
            if parse_stat(proc.read("stat")).starttime_ticks != self._start.starttime_ticks:
                raise UserError(f"pid {self.pid}", "has ended")
            nice = os.getpriority(os.PRIO_PROCESS, self.pid)
            entry = Entry.begin(
                self._start.offer,
                Side.SOURCE,
                self._start.destination,
                peer_boot_id=self._start.destination_boot_id,
                starttime_ticks=self._start.starttime_ticks,
                origin_cgroup=str(of_process(self.pid)),
            )
            begin = guestwords.Begin(
                host=self._start.destination,
                cwd=proc.link("cwd"),
                pipes=tuple(self._pipes),
                devices=tuple(self._devices),
                limits=parse_limits(proc.read("limits")),
                umask=status.umask,
                nice=nice,
                low=self._start.low,
                terminal=self._describe_terminal(),
            )
        journal.record(dataclasses.replace(entry, state=State.RESUMED))
        starting = Reply("starting", self._start.destination, str(deputy_socket), str(program))
        signal_fd = syscalls.signalfd(syscalls.ALL_SIGNALS)
        try:
            socket.send_fds(self._client, [starting.encode()], [signal_fd])
        finally:
            os.close(signal_fd)
        self._let_client_go()
        line.send(begin)
        self._connect(line, on_closed)

    def refuse(self, error: MigrateError) -> None:
        """Tell the client that nothing was run."""
        self._tell(Reply.refused(error))

    def complain(self, text: str) -> None:
        """One line on the command's stderr; nothing if that takes none now."""
        poll = select.poll()
        poll.register(self._complaints, select.POLLOUT)
        with contextlib.suppress(OSError):
            if poll.poll(0):
                line = f"migrate: {text}".encode(errors="replace")[: LINE_BYTES - 1]
                os.write(self._complaints, line + b"\n")

    def close(self) -> None:
        """Give everything back."""
        self._let_client_go()
        for end in (*self.sinks, *self.sources):
            end.close()
        for fd in (*self._stdio, self._complaints, self.release_terminal()):
            if fd >= 0:
                os.close(fd)
        self._stdio = []

    # ------------------------------------------------------------------ inside

    def _progress(self, step: str) -> None:
        self._tell(Reply("progress", step))

    def _tell(self, reply: Reply) -> None:
        with contextlib.suppress(OSError):
            self._client.send(reply.encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def _client_stirs(self, events: int) -> None:
        """It says nothing any more: so this is its end."""
        self._client_gone = True
        self._reactor.modify(self._client.fileno(), 0)
        self._reactor.unregister(self._client.fileno())

    def _let_client_go(self) -> None:
        if self._client.fileno() >= 0:
            if not self._client_gone:
                self._reactor.unregister(self._client.fileno())
            self._client.close()

    def _read_command(self) -> bytes:
        """:raises UserError: it is too long, or could still be changed."""
        try:
            sealed = fcntl.fcntl(self._command_fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
            size = os.fstat(self._command_fd).st_size
            if not sealed:
                raise UserError("command", "is not sealed")
            if size > MAX_COMMAND_BYTES:
                raise UserError("command", "its arguments and environment are too long")
            return os.pread(self._command_fd, size, 0)
        except OSError:
            raise UserError("command", "is no sealed file in memory") from None
        finally:
            os.close(self._command_fd)

    def _lay_out(self, line: HomeLine) -> None:
        """Which descriptor becomes what at the far end. Streams must be open before it may use them."""
        groups: list[list[int]] = []
        terminals = self._open_terminal(line)
        for number, fd in enumerate(self._stdio):
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise UserError(f"descriptor {number}", "is a directory")
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if stat.S_ISCHR(status.st_mode):
                major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
                if major == _MEMORY_MAJOR and minor in _DEVICES:
                    path = _DEVICES[minor]
                    device = guestwords.CommandDevice(number, path, flags & _OPEN_FLAGS)  # type: ignore[arg-type]
                    self._devices.append(device)
                    continue
                if (major, minor) in terminals:
                    self._terminal_numbers.append(number)
                    continue
                if number == 0 and os.isatty(fd):
                    reason = "is a terminal that is not the controlling one of its session"
                    raise UserError("stdin", reason, "take it from a file or pipe")
            if number == 2 and groups and groups[-1][0] == 1 and _same(self._stdio[1], fd):
                groups[-1].append(2)
            else:
                groups.append([number])
        for stream, numbers in enumerate(groups, guestwords.FIRST_PIPE_STREAM):
            line.lifeline.open(stream)
            self._pipes.append(guestwords.CommandPipe(stream, numbers[0] > 0, tuple(numbers)))

    def _open_terminal(self, line: HomeLine) -> tuple[tuple[int, int], ...]:
        """:returns: the device numbers by which it may be open."""
        offered = self._start.offer.terminal
        if offered is None:
            return ()
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self._terminal_fd = os.open(f"/dev/pts/{offered.index}", flags)
        except OSError as error:
            raise UserError("terminal", f"cannot be opened: {error.strerror}") from None
        line.lifeline.open(guestwords.TERMINAL_STREAM, TERMINAL_WINDOW)
        device = os.fstat(self._terminal_fd).st_rdev
        return (os.major(device), os.minor(device)), _OWN_TERMINAL

    def _describe_terminal(self) -> guestwords.CommandTerminal | None:
        if self._terminal_fd < 0:
            return None
        self.in_front = in_foreground(self.pid) and not sharers(self.pid)[1]
        try:
            return guestwords.CommandTerminal(
                Size.of(self._terminal_fd),
                Mode.of(self._terminal_fd),
                tuple(self._terminal_numbers),
                self.in_front,
            )
        except termios.error as error:
            raise UserError("terminal", str(error)) from None

    def release_terminal(self) -> int:
        """Its descriptor, the caller's from now on; -1 if there is none."""
        fd, self._terminal_fd = self._terminal_fd, -1
        return fd

    def _connect(self, line: HomeLine, on_closed: Callable[[list[int]], None]) -> None:
        for pipe in self._pipes:
            stream = line.lifeline.open(pipe.stream)
            numbers = list(pipe.numbers)
            fd = os.dup(self._stdio[numbers[0]])

            def over(end: End, numbers: list[int] = numbers) -> None:
                on_closed(numbers)

            if pipe.outgoing:
                self.sinks.append(FdSink(self._reactor, stream.receiver, fd, on_end=over))
                continue
            mode = os.fstat(fd).st_mode
            kind: type[Source]
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                kind = PeekSource
                # What is seen stays in the pipe until the command has read it: so much is under way.
                with contextlib.suppress(OSError):
                    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < WINDOW:
                        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, WINDOW)
            else:
                kind = FileSource if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else FdSource
            self.sources.append(kind(self._reactor, stream.sender, fd, on_end=over))
        # What the command has closed must be closed here too, for those who read or write it.
        for fd in self._stdio:
            os.close(fd)
        self._stdio = []


def _same(first: int, second: int) -> bool:
    """Whether what is written to one comes, in order, where the other's goes."""
    one, other = os.fstat(first), os.fstat(second)
    if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino):
        return False
    own = os.getpid()
    return stat.S_ISFIFO(one.st_mode) or not syscalls.kcmp(
        own, own, syscalls.KCMP_FILE, first, second
    )


def lost_line(host: str) -> str:
    """What the user is told when the guest is given up."""
    return str(HostError(f"host {host}", "is lost, and the command with it"))
