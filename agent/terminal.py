"""The far pty: stands for home's terminal where the guest runs. The keeper holds it.

Life of one, for `migrate -p` and for commands that are started here alike:

1. `mounted(directory)` gives the capsule a devpts of its own; `FarTerminal(...)` opens a pty there,
   with the number of home's terminal where that is possible, so that `tty` says the same.
2. The leader of the guest's session calls `lead()` before it forks anybody (agent/session.py): only
   what is forked later has it as its controlling terminal.
3. CRIU gets the slave in place of home's terminal: `path` inside the capsule. Then, while all is
   frozen still, `restore(state)`: what waited elsewhere waits here, and the foreground is home's.
   (A command that starts here: `begin` instead, and the command itself takes the foreground.)
4. `connect` joins it to its stream of the lifeline: keys come in, output goes out.
5. Home's words about it (agent/guestwords.py): `obey`. When the guest stops or ends: `leave`, and
   tell home once `settled`. At a hop: `hand_over`, or `take_back` after a failure.

The caller, the guest's parent, is in the guest's session where home's parent was. It ignores SIGTTOU,
SIGTTIN, SIGHUP and the signals of the keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

from agent import guestwords, syscalls
from agent.endpoints import FdSource
from agent.link import TerminalState
from agent.reactor import WRITE, Reactor
from agent.syscalls import MNT_DETACH, MS_NOEXEC, MS_NOSUID
from agent.terminal_mode import Mode, Size, put_waiting, take_waiting
from agent.wire import Receiver, Stream, nothing

DEVPTS_OPTIONS = "newinstance,ptmxmode=0666,mode=620,gid=5"
"""gid 5 is the group tty of every Debian system."""
TERMINAL_WINDOW = 1 << 16
"""Bytes that may be on their way: what is typed further waits in home's terminal."""
TERMINAL_SIGNALS = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGHUP,
)
"""The guest's, to be ignored by the keeper: it may share its session, even its group."""
# asm-generic/ioctls.h; the standard library has them from Python 3.13 on.
_TIOCGPTN = 0x80045430
_TIOCSPTLCK = 0x40045431
_MOST_SPARE = 256
_KEYS_AT_ONCE = 1024


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    """A new instance of devpts at a directory that is made for it and removed afterwards.

    :raises OSError: it cannot be mounted.
    """
    directory.mkdir(mode=0o755)
    syscalls.mount("devpts", directory, "devpts", MS_NOSUID | MS_NOEXEC, DEVPTS_OPTIONS)
    try:
        yield directory
    finally:
        syscalls.umount(directory, MNT_DETACH)
        directory.rmdir()


def criu_keys(fd: int) -> tuple[str, str]:
    """CRIU's names (--external, --inherit-fd) of a terminal and of /dev/tty, as it was opened also."""
    files = (os.fstat(fd), Path("/dev/tty").stat())
    terminal, alias = (f"tty[{file.st_rdev:x}:{file.st_dev:x}]" for file in files)
    return terminal, alias


class FarTerminal:
    """See the module."""

    def __init__(self, devpts: Path, index: int, uid: int) -> None:
        """
        :param index: N of home's /dev/pts/N.
        :param uid: whose terminal it is.
        :raises OSError: there is no pty left.
        """
        self.master, self.number = _open_master(devpts, index)
        fcntl.ioctl(self.master, _TIOCSPTLCK, struct.pack("i", 0))
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        self.slave = os.open(devpts / str(self.number), flags)
        os.fchown(self.slave, uid, -1)
        self._output: FdSource | None = None
        self._keys: _Keys | None = None
        self._stream: Stream | None = None
        self._state = TerminalState()
        self._front = 0
        """the group that had it before it went into the background"""
        self._mark: int | None = None
        """end of the output whose arrival is waited for"""

    @property
    def path(self) -> str:
        """Of the slave, inside the capsule."""
        return f"/dev/pts/{self.number}"

    @property
    def keys(self) -> tuple[str, str]:
        """See `criu_keys`."""
        return criu_keys(self.slave)

    def lead(self) -> None:
        """It becomes the controlling terminal of the calling session leader."""
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    # ------------------------------------------------------------------ the foreground

    @property
    def foreground(self) -> int:
        """The group that has it, 0 if that is nobody's of this pid namespace."""
        with contextlib.suppress(OSError):
            return os.tcgetpgrp(self.master)
        return 0

    def set_foreground(self, group: int) -> None:
        """No effect if the caller is not in the terminal's session, or there is no such group."""
        with contextlib.suppress(OSError):
            os.tcsetpgrp(self.slave, group)

    def _into_background(self) -> None:
        foreground = self.foreground
        if foreground != os.getsid(0):
            self._front = foreground
        self.set_foreground(os.getsid(0))

    def _into_foreground(self, group: int) -> None:
        """Whoever had it last, else this group: what runs in a shell there, or the shell."""
        if self.foreground in (0, os.getsid(0)):
            self.set_foreground(group)
            if self._front:
                self.set_foreground(self._front)

    @contextlib.contextmanager
    def _readable_for_us(self) -> Iterator[None]:
        """Only the foreground may read its own terminal."""
        before = self.foreground
        self.set_foreground(os.getpgrp())
        try:
            yield
        finally:
            if before:
                self.set_foreground(before)

    # ------------------------------------------------------------------ streams

    def restore(self, state: TerminalState) -> None:
        """What it was like where the guest was last; CRIU has restored mode and size."""
        self._state = state
        with contextlib.suppress(OSError, termios.error):
            put_waiting(self.slave, state.waiting)
        if state.foreground:
            self.set_foreground(state.foreground)
        else:
            self._into_background()

    def begin(self, wanted: guestwords.CommandTerminal) -> None:
        """Nobody has used it yet: make it what home's is."""
        with contextlib.suppress(OSError, termios.error):
            wanted.mode.apply(self.slave)
            wanted.size.apply(self.master)

    def connect(self, reactor: Reactor, stream: Stream) -> None:
        """From now on bytes go to and fro. No effect the second time."""
        if self._keys is not None:
            return
        self._stream = stream
        self._output = FdSource(reactor, stream.sender, os.dup(self.master), private=True)
        self._keys = _Keys(reactor, stream.receiver, os.dup(self.master))
        self._keys.skip_to = self._state.skip_to
        if self._state.reading:
            self._keys.go()

    def settled(self) -> bool:
        """Whether all output that there was when this was first asked is at home."""
        if self._stream is None or self._output is None:
            return True
        sender = self._stream.sender
        if self._mark is None:
            self._output.drain()
            self._mark = sender.end
        if not sender.reset and sender.acked < self._mark:
            return False
        self._mark = None
        return True

    # ------------------------------------------------------------------ home's words

    def obey(self, word: guestwords.ToKeeper, group: int) -> None:
        """One of home's words about the terminal; others are left alone.

        :param group: of the guest's root.
        """
        match word:
            case guestwords.TakeTerminal():
                self._take(word, group)
            case guestwords.YieldTerminal():
                self._into_background()
            case guestwords.ResizeTerminal(size):
                self.resize(size)
            case guestwords.HangUp():
                self.hang_up()

    def _take(self, word: guestwords.TakeTerminal, group: int) -> None:
        if self._keys is None:
            return
        with contextlib.suppress(OSError, termios.error):
            if word.mode is not None:
                word.mode.apply(self.slave)
            put_waiting(self.slave, word.waiting)
        self.resize(word.size)
        if word.in_front:
            self._into_foreground(group)
        self._keys.skip_to = max(self._keys.skip_to, word.skip_to)
        self._keys.go()

    def resize(self, size: Size) -> None:
        """The foreground group is told if that changes anything."""
        with contextlib.suppress(OSError):
            size.apply(self.master)

    def hang_up(self) -> None:
        """Home's terminal is gone for good."""
        for part in (self._output, self._keys):
            if part is not None:
                part.close()
        self._output = self._keys = None
        os.close(self.master)
        self.master = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    # ------------------------------------------------------------------ stops, the end, hops

    def leave(self) -> guestwords.TerminalLeft:
        """The guest has stopped or ended: what it leaves. No key reaches it until `take`."""
        if self._keys is not None:
            self._keys.pause()
        left = guestwords.TerminalLeft()
        with contextlib.suppress(OSError, termios.error), self._readable_for_us():
            left = guestwords.TerminalLeft(Mode.of(self.slave), take_waiting(self.slave))
        self._into_background()
        return left

    def hand_over(self) -> TerminalState:
        """Of a frozen guest: all that the next keeper must know. The stream is exported after it."""
        if self._output is not None:
            self._output.drain()
        foreground = self.foreground
        waiting = b""
        with contextlib.suppress(OSError, termios.error), self._readable_for_us():
            waiting = take_waiting(self.slave)
        self._state = TerminalState(
            keys=self.keys,
            foreground=0 if foreground == os.getsid(0) else foreground,
            waiting=waiting,
            skip_to=self._keys.skip_to if self._keys is not None else 0,
            reading=self._keys is not None and self._keys.going,
        )
        return self._state

    def take_back(self) -> None:
        """The hop has failed."""
        with contextlib.suppress(OSError, termios.error):
            put_waiting(self.slave, self._state.waiting)

    def close(self) -> None:
        """Hang it up for whoever still has it."""
        self.hang_up()
        os.close(self.master)
        os.close(self.slave)


class _Keys:
    """Stream → master, as long as home's terminal is the guest's."""

    def __init__(self, reactor: Reactor, receiver: Receiver, fd: int) -> None:
        self._reactor = reactor
        self._receiver = receiver
        self._fd = fd
        self._blocked = False
        self.skip_to = 0
        """keys before this offset went back to home"""
        self.going = False
        receiver.on_readable = self._pump

    def go(self) -> None:
        self.going = True
        self._reactor.defer(self._pump)

    def pause(self) -> None:
        self.going = False
        self._wait_for_room(False)

    def close(self) -> None:
        self.pause()
        self._receiver.on_readable = nothing
        os.close(self._fd)

    def _pump(self) -> None:
        receiver = self._receiver
        while self.going and (view := receiver.peek()):
            count = min(len(view), self.skip_to - receiver.taken)
            if count <= 0:
                try:
                    count = os.write(self._fd, view[:_KEYS_AT_ONCE])
                except BlockingIOError:
                    self._wait_for_room(True)
                    return
                except OSError:
                    count = len(view)  # it was hung up
            receiver.take(count)
            receiver.consume(receiver.taken)
        self._wait_for_room(False)

    def _wait_for_room(self, wanted: bool) -> None:
        if wanted and not self._blocked:
            self._reactor.register(self._fd, WRITE, lambda _: self._pump())
        elif self._blocked and not wanted:
            self._reactor.unregister(self._fd)
        self._blocked = wanted


def _open_master(devpts: Path, index: int) -> tuple[int, int]:
    """A master and its number: `index`, or the nearest below it that can be had."""
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    spare: list[int] = []
    try:
        while True:
            fd = os.open(devpts / "ptmx", flags)
            (number,) = struct.unpack("I", fcntl.ioctl(fd, _TIOCGPTN, bytes(4)))
            if number >= index or len(spare) >= _MOST_SPARE:
                return fd, number
            spare.append(fd)
    finally:
        for other in spare:
            os.close(other)
