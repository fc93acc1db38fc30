"""Home's end of a guest's terminal: keys to the far pty, output from it. The guard holds it.

The deputy only stands in its process group, where the shell sees it; all work on the terminal is
done here, by a process outside of the terminal's session, which job control therefore never stops.

* Keys are read only while the deputy's group is in the foreground and the deputy is not stopped;
  else they are the shell's. Meanwhile the terminal is raw: the far pty makes lines, echo and signals
  of them. `look` finds out; it is called by a timer and whenever there is reason to.
* When the guest stops or ends, the terminal gets the mode that the guest has left, and the input
  that it has not read waits there again, for whoever reads next.
* Where others share the foreground (`guest | less`, a script that waits for the guest), the keys
  stay theirs until the guest asks for one: in the far background, a read stops it with SIGTTIN, the
  guard hears of that and takes the terminal (as sudo does for a pipeline). Even then the terminal
  goes on making signals of keys, for all of them.

What comes back from the far end is put into the terminal only if it was read from it before.
"""

from __future__ import annotations

import contextlib
import os
import termios
from collections.abc import Callable

from agent import guestwords
from agent.reactor import BROKEN, READ, WRITE, Reactor, Timer
from agent.terminal_mode import (
    Mode,
    Size,
    put_waiting,
    read_all,
    take_waiting,
    type_keys,
)
from agent.wire import Receiver, Stream, nothing
from criu_hooks.proc import ProcDir, Stat, all_pids, ancestors, parse_stat

LOOK_SECONDS = 0.1
"""Nobody is told when a terminal's foreground changes: so we look."""
_KEYS_AT_ONCE = 1024
_OUTPUT_AT_ONCE = 4096
_REMEMBERED = 1 << 16


def process_stat(pid: int) -> Stat | None:
    """None: it is gone."""
    try:
        with ProcDir(pid) as proc:
            return parse_stat(proc.read("stat"))
    except OSError:
        return None


def in_foreground(pid: int) -> bool:
    """Its controlling terminal is its group's, and it is not stopped."""
    stat = process_stat(pid)
    return stat is not None and stat.pgid == stat.foreground and stat.state not in "TZX"


def sharers(pid: int, members: frozenset[int] = frozenset()) -> tuple[bool, bool]:
    """Who else is in the group of this process, `members` (its tree) aside.

    :returns: whether there is anybody, and whether anybody who is none of its ancestors.
    """
    own = process_stat(pid)
    if own is None:
        return False, False
    others = {
        other
        for other in all_pids()
        if other != pid
        and other not in members
        and (stat := process_stat(other)) is not None
        and stat.pgid == own.pgid
        and stat.state not in "ZX"
    }
    return bool(others), bool(others - set(ancestors(pid)))


class HomeTerminal:
    """See the module."""

    def __init__(
        self,
        reactor: Reactor,
        stream: Stream,
        fd: int,
        deputy: int,
        send: Callable[[guestwords.ToKeeper], None],
        connected: Callable[[], bool],
    ) -> None:
        """
        :param fd: of the terminal, a description of our own that does not block; closed at the end.
        :param deputy: pid of the process that stands in the terminal's session.
        :param send: tells the keeper.
        :param connected: whether the keeper can be reached now.
        """
        self._reactor = reactor
        self._sender = stream.sender
        self._fd = fd
        self._deputy = deputy
        self._send = send
        self._connected = connected
        self._output = _Output(reactor, stream.receiver, os.dup(fd))
        self._taken = False
        self._shared = False
        self._mode: Mode | None = None
        """before it was taken"""
        self._size = Size.of(fd)
        self._recent = b""
        self._returned = 0
        """keys before this offset of the stream went back into the terminal"""
        self._reading = False
        self._gone = False
        self._stopped = False
        """and so will be the deputy"""
        self._timer: Timer | None = None

    # ------------------------------------------------------------------ what the guard tells

    def start(self, *, in_front: bool) -> None:
        """The guest runs at the far end now.

        :param in_front: as it was told to the keeper with the images.
        """
        if in_front and in_foreground(self._deputy):
            self._take(far_mode=None, in_front=False)
        elif in_front:
            self._send(guestwords.YieldTerminal())
        self._tick()

    def wanted(self, signal_number: int) -> bool:
        """The guest stopped because it asked for a terminal which it may have: it shall go on.

        The caller sends it SIGCONT then.
        """
        if self._taken or signal_number not in _ASKING or not in_foreground(self._deputy):
            return False
        self._take(far_mode=self._current_mode(), in_front=True)
        return self._taken

    def continued(self) -> None:
        """The deputy goes on: before the guest hears that, it has the terminal if it may."""
        self._stopped = False
        self.look()

    def left(self, left: guestwords.TerminalLeft | None) -> None:
        """The guest has stopped or ended, and all its output is written."""
        self._stopped = True
        if not self._taken:
            return
        keys = self._release()
        if not in_foreground(self._deputy):
            return
        with contextlib.suppress(OSError, termios.error):
            mode = left.mode if left is not None else None
            (mode or self._mode or Mode.of(self._fd)).apply(self._fd)
            if left is not None and _is_part_of(left.waiting, self._recent):
                put_waiting(self._fd, left.waiting)
            type_keys(self._fd, keys)
            self._returned = self._sender.end

    def cut_off(self) -> None:
        """The keeper cannot be reached: meanwhile keys make signals here."""
        if self._taken:
            self._release()
            self._restore()

    def deputy_died(self, session: int) -> None:
        """By another's hand. `session`: pid of the leader of the terminal's session."""
        if not self._taken:
            return
        self._release()
        leader = process_stat(session)
        if leader is not None and leader.foreground != leader.pgid:
            self._restore()

    def look(self) -> bool:
        """Find out what is new at the terminal. :returns: whether that was (also) its size."""
        if self._gone:
            return False
        try:
            size = Size.of(self._fd)
        except OSError:
            self._hung_up()
            return False
        resized, self._size = size != self._size, size
        if resized:
            self._send(guestwords.ResizeTerminal(size))
        foreground = in_foreground(self._deputy)
        if self._taken and not foreground:
            self._release()
            self._send(guestwords.YieldTerminal())
        elif not self._taken and foreground and self._may_take():
            self._take(far_mode=self._current_mode(), in_front=True)
        return resized

    def close(self) -> None:
        """Let go of the terminal, in its old mode if it was still taken."""
        if self._timer is not None:
            self._timer.cancel()
        if self._taken:
            self._release()
            self._restore()
        self._output.close()
        os.close(self._fd)

    # ------------------------------------------------------------------ taking and releasing

    def _tick(self) -> None:
        self.look()
        self._timer = self._reactor.call_later(LOOK_SECONDS, self._tick)

    def _may_take(self) -> bool:
        """Unasked: if nobody else may want the keys."""
        return not self._stopped and self._connected() and not sharers(self._deputy)[1]

    def _current_mode(self) -> Mode | None:
        try:
            return Mode.of(self._fd)
        except termios.error:
            return None

    def _take(self, *, far_mode: Mode | None, in_front: bool) -> None:
        self._shared, _ = sharers(self._deputy)
        try:
            self._mode = Mode.of(self._fd)
            waiting = take_waiting(self._fd)
            self._mode.raw(shared=self._shared).apply(self._fd)
            waiting += read_all(self._fd)
            self._size = Size.of(self._fd)
        except (OSError, termios.error):
            self._hung_up()
            return
        self._remember(waiting)
        self._taken = True
        self._send(guestwords.TakeTerminal(self._size, far_mode, waiting, self._returned, in_front))
        self._sender.on_ack = self._read_if_room
        self._read_if_room()

    def _release(self) -> bytes:
        """:returns: keys that were read, and are not with the guest."""
        self._taken = False
        self._sender.on_ack = nothing
        self._watch(False)
        return self._sender.unacked()

    def _restore(self) -> None:
        if self._mode is not None:
            with contextlib.suppress(OSError, termios.error):
                self._mode.apply(self._fd)

    def _hung_up(self) -> None:
        if not self._gone:
            self._gone = True
            self._release()
            self._output.discard()
            self._send(guestwords.HangUp())

    # ------------------------------------------------------------------ keys

    def _read_if_room(self) -> None:
        self._watch(self._taken and self._sender.room > 0)

    def _watch(self, wanted: bool) -> None:
        if wanted and not self._reading:
            self._reactor.register(self._fd, READ, self._key)
        elif self._reading and not wanted:
            self._reactor.unregister(self._fd)
        self._reading = wanted

    def _key(self, events: int) -> None:
        if not in_foreground(self._deputy):
            self.look()
            return
        try:
            data = os.read(self._fd, min(_KEYS_AT_ONCE, self._sender.room))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            if events & BROKEN:
                self._hung_up()
            return
        self._remember(data)
        self._sender.write(data)
        self._read_if_room()

    def _remember(self, data: bytes) -> None:
        self._recent = (self._recent + data)[-_REMEMBERED:]


_ASKING = (21, 22)
"""SIGTTIN and SIGTTOU."""


def _is_part_of(waiting: bytes, typed: bytes) -> bool:
    """Whether all of it was typed, in this order; the far line discipline has left some out."""
    keys = iter(typed.replace(b"\r", b"\n").replace(b"\4", b"\0"))
    return all(byte in keys for byte in waiting.replace(b"\r", b"\n").replace(b"\4", b"\0"))


class _Output:
    """Stream → terminal; acknowledged once written.

    While the terminal itself makes CR NL of each NL, so has the far pty done already: undone here.
    """

    def __init__(self, reactor: Reactor, receiver: Receiver, fd: int) -> None:
        self._reactor = reactor
        self._receiver = receiver
        self._fd = fd
        self._rest = b""
        self._taken = 0
        """of what the receiver shows, for `_rest`"""
        self._blocked = False
        self._discarding = False
        receiver.on_readable = self._pump
        reactor.defer(self._pump)

    def discard(self) -> None:
        """The terminal is no more."""
        self._discarding = True
        self._pump()

    def close(self) -> None:
        self._receiver.on_readable = nothing
        self._wait_for_room(False)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _pump(self) -> None:
        if self._fd < 0:
            return
        while view := self._receiver.peek():
            if self._discarding:
                self._done(len(view))
                continue
            if not self._rest:
                chunk = bytes(view[:_OUTPUT_AT_ONCE])
                self._taken = len(chunk)
                self._rest = self._as_written(chunk)
            try:
                count = os.write(self._fd, self._rest)
            except BlockingIOError:
                self._wait_for_room(True)
                return
            except OSError:
                count = len(self._rest)  # it was hung up
            self._rest = self._rest[count:]
            if not self._rest:
                self._done(self._taken)
        self._wait_for_room(False)

    def _as_written(self, chunk: bytes) -> bytes:
        with contextlib.suppress(termios.error):
            if Mode.of(self._fd).adds_returns:
                return chunk.replace(b"\r\n", b"\n")
        return chunk

    def _done(self, count: int) -> None:
        self._receiver.take(count)
        self._receiver.consume(self._receiver.taken)

    def _wait_for_room(self, wanted: bool) -> None:
        if wanted and not self._blocked:
            self._reactor.register(self._fd, WRITE, lambda _: self._pump())
        elif self._blocked and not wanted:
            self._reactor.unregister(self._fd)
        self._blocked = wanted
