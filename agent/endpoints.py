"""What a stream of the lifeline ends in: pipes, sockets and terminals, some shared with strangers.

Every endpoint owns the descriptor it is given and closes it at its end. O_NONBLOCK is a flag of the
description, which a user's shell may share: it is only ever set on descriptions that are ours.
"""

import contextlib
import ctypes
import enum
import fcntl
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Callable
from typing import Final

from agent.reactor import BROKEN, EDGE, READ, WRITE, Reactor, Timer
from agent.wire import Receiver, Sender, Stream, nothing

CHUNK: Final = 1 << 18
"""Most bytes of one read."""
METER_SECONDS: Final = (0.005, 0.1)
"""The first and the longest pause between two looks at what a guest has left unread."""
_PTS_MAJORS: Final = range(136, 144)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
_libc.tee.restype = ctypes.c_ssize_t


class End(enum.Enum):
    """How an endpoint ended by itself."""

    FINISHED = "the end of the data"
    RESET = "the reader wants no more"


OnEnd = Callable[[End], None]


def _ignore(end: End) -> None:
    """The owner who does not ask."""


def unread(fd: int) -> int:
    """Bytes that lie in a pipe or socket, asked through either end of a pipe (FIONREAD)."""
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(count)


class _Port:
    """A descriptor read and written without ever blocking, and without a change to its flags.

    A pipe and a terminal are opened once more, which gives a description of our own; a socket has
    flags for each call; anything else is asked by poll first, and written in pieces that then fit
    (PIPE_BUF is what POLLOUT promises of a pipe; a second writer could still be faster than us).

    :param private: nobody else has this description, so O_NONBLOCK may simply be set.
    """

    def __init__(self, fd: int, mode: int, *, private: bool = False) -> None:
        self.fd = self.io = fd
        status = os.fstat(fd)
        self.fifo = stat.S_ISFIFO(status.st_mode)
        self._is_socket = stat.S_ISSOCK(status.st_mode)
        self._poll: select.poll | None = None
        self._socket: socket.socket | None = None
        pts = stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in _PTS_MAJORS
        if private:
            os.set_blocking(fd, False)
        elif self._is_socket:
            self._socket = socket.socket(fileno=os.dup(fd))
            self.io = self._socket.fileno()
        elif not stat.S_ISREG(status.st_mode) and not ((self.fifo or pts) and self._reopen(mode)):
            self._poll = select.poll()
            self._poll.register(fd, READ if mode == os.O_RDONLY else WRITE)

    def _reopen(self, mode: int) -> bool:
        flags = mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            self.io = os.open(f"/proc/self/fd/{self.fd}", flags)
            return True
        return False

    def read(self, limit: int) -> bytes:
        """:raises BlockingIOError: nothing is there; empty at the end."""
        if self._socket is not None:
            return self._socket.recv(limit, socket.MSG_DONTWAIT)
        self._must_be_ready()
        return os.read(self.io, limit)

    def peek(self, limit: int) -> bytes:
        """What a socket holds, which stays there."""
        assert self._socket is not None
        return self._socket.recv(limit, socket.MSG_DONTWAIT | socket.MSG_PEEK)

    def write(self, data: memoryview) -> int:
        """:raises BlockingIOError: there is no room."""
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        self._must_be_ready()
        return os.write(self.io, data if self._poll is None else data[: select.PIPE_BUF])

    def _must_be_ready(self) -> None:
        if self._poll is not None and not self._poll.poll(0):
            raise BlockingIOError

    def shut_down(self, how: int) -> None:
        """End one direction of a socket for everybody who holds it; other files have but one."""
        if not self._is_socket:
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.fd)) as shut:
            shut.shutdown(how)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        elif self.io != self.fd:
            os.close(self.io)
        os.close(self.fd)


class _Watch:
    """What a descriptor is waited for. A file that epoll refuses counts as always ready."""

    def __init__(self, reactor: Reactor, fd: int, call: Callable[[int], None]) -> None:
        self._reactor = reactor
        self._fd = fd
        self._call = call
        self._events: int | None = None
        self._pollable = True
        self._deferred = False
        try:
            reactor.register(fd, 0, call)
            reactor.unregister(fd)
        except PermissionError:
            self._pollable = False

    def want(self, events: int | None) -> None:
        """Wait for `events` and for errors; None: for nothing at all (ERR and HUP come unasked)."""
        before, self._events = self._events, events
        if before == events:
            return
        if not self._pollable:
            self._again()
        elif before is None:
            assert events is not None
            self._reactor.register(self._fd, events, self._call)
        elif events is None:
            self._reactor.unregister(self._fd)
        else:
            self._reactor.modify(self._fd, events)

    def _again(self) -> None:
        if self._events and not self._deferred:
            self._deferred = True
            self._reactor.defer(self._always)

    def _always(self) -> None:
        self._deferred = False
        if self._events:
            self._call(self._events)
            self._again()


class FdSource:
    """Descriptor → stream, as far as the stream has room. Its end is the FIN of the stream.

    When the far reader wants no more, the descriptor is closed: the local writer gets SIGPIPE.
    """

    def __init__(
        self,
        reactor: Reactor,
        sender: Sender,
        fd: int,
        *,
        private: bool = False,
        on_end: OnEnd = _ignore,
    ) -> None:
        self._sender = sender
        self._on_end = on_end
        self._private = private
        self._port = _Port(fd, os.O_RDONLY, private=private)
        self._watch = _Watch(reactor, self._port.io, self._ready)
        self._open = True
        sender.on_ack = self._update
        sender.on_reset = self._refused
        if sender.reset:
            reactor.defer(self._refused)
        else:
            self._update()

    def drain(self) -> int:
        """Take in what is there now, even more than the window (before a hop); the bytes read."""
        before = self._sender.end
        with contextlib.suppress(BlockingIOError):
            while self._open:
                self._read(CHUNK)
        return self._sender.end - before

    def close(self) -> None:
        """Let go of both, without a FIN."""
        if self._open:
            self._open = False
            self._sender.on_ack = self._sender.on_reset = nothing
            self._watch.want(None)
            self._port.close()

    def _update(self) -> None:
        # With no room not even HUP is waited for: it would wake us for ever.
        self._watch.want(READ if self._sender.room else None)

    def _ready(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._read(min(CHUNK, self._sender.room))
        if self._open:
            self._update()

    def _read(self, limit: int) -> None:
        try:
            data = self._port.read(limit)
        except BlockingIOError:
            raise
        except OSError:
            data = b""  # a pty whose slaves are gone says EIO; a socket, that it was reset
        if data:
            self._sender.write(data)
            return
        self.close()
        self._sender.finish()
        self._on_end(End.FINISHED)

    def _refused(self) -> None:
        if self._open:
            if self._private:
                self._port.shut_down(socket.SHUT_RD)
            self.close()
            self._on_end(End.RESET)


class FdSink:
    """Stream → descriptor; acknowledged once written. After the FIN the descriptor is closed.

    When the local reader is gone (or the file cannot take more), the sender is told by RESET.
    """

    def __init__(
        self,
        reactor: Reactor,
        receiver: Receiver,
        fd: int,
        *,
        private: bool = False,
        on_end: OnEnd = _ignore,
    ) -> None:
        self._reactor = reactor
        self._receiver = receiver
        self._on_end = on_end
        self._private = private
        self._port = _Port(fd, os.O_WRONLY, private=private)
        self._watch = _Watch(reactor, self._port.io, self._ready)
        self._open = True
        self._blocked = False
        # The reader of a named FIFO may come back, and only a write shows that it is gone.
        link = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 (pathlib costs a megabyte)
        named = self._port.fifo and not link.startswith("pipe:")
        self._idle_events = None if named else 0
        receiver.on_readable = self._readable
        self._watch.want(self._idle_events)
        reactor.defer(self._readable)  # what the stream holds already

    def close(self) -> None:
        """Let go of both; what was not written stays in the stream."""
        if self._open:
            self._release()

    def _release(self) -> None:
        self._open = False
        self._receiver.on_readable = nothing
        self._watch.want(None)
        self._port.close()

    def _readable(self) -> None:
        if self._open and not self._blocked:
            self._pump()

    def _ready(self, events: int) -> None:
        if events & BROKEN and not events & WRITE:
            self._broken()
        else:
            self._pump()

    def _pump(self) -> None:
        self._blocked = False
        while view := self._receiver.peek():
            try:
                count = self._port.write(view)
            except BlockingIOError:
                self._blocked = True
                break
            except OSError:
                self._broken()
                return
            self._receiver.take(count)
            self._wrote()
        self._watch.want(WRITE if self._blocked else self._idle_events)
        if self._receiver.at_end:
            self._ended()

    def _wrote(self) -> None:
        self._receiver.consume(self._receiver.taken)

    def _ended(self) -> None:
        if self._private:
            self._port.shut_down(socket.SHUT_WR)
        self._release()
        self._receiver.finish()
        self._on_end(End.FINISHED)

    def _broken(self) -> None:
        self._release()
        self._receiver.refuse()
        self._on_end(End.RESET)


class MeteredSink(FdSink):
    """Stream → the pipe that is a guest's stdin; acknowledged is what the guest has really read.

    A full pipe tells by POLLOUT when the guest reads. For less than a full pipe the kernel has no
    event at all (a reader wakes writers only if the pipe was full), so a timer looks, seldom while
    nothing moves; whoever must know exactly calls `settle`.

    :param fd: the write end of an empty pipe of our own; the guest has the read end.
    """

    def __init__(
        self, reactor: Reactor, receiver: Receiver, fd: int, *, on_end: OnEnd = _ignore
    ) -> None:
        self._pause = METER_SECONDS[0]
        self._timer: Timer | None = None
        self._gauge = fd  # -1: there is nothing to ask any more
        super().__init__(reactor, receiver, fd, private=True, on_end=on_end)

    def settle(self) -> int:
        """Acknowledge exactly what the guest has read by now; returns that offset."""
        if self._gauge >= 0:
            self._receiver.consume(self._receiver.taken - unread(self._gauge))
            self._drained()
        return self._receiver.consumed

    def close(self) -> None:
        super().close()
        self._forget()

    def _wrote(self) -> None:
        self._receiver.consume(self._receiver.taken - unread(self._gauge))
        if self._timer is None:
            self._pause = METER_SECONDS[0]
            self._timer = self._reactor.call_later(self._pause, self._look)

    def _look(self) -> None:
        self._timer = None
        before = self._receiver.consumed
        if self.settle() < self._receiver.taken:
            moved = self._receiver.consumed > before
            self._pause = METER_SECONDS[0] if moved else min(2 * self._pause, METER_SECONDS[1])
            self._timer = self._reactor.call_later(self._pause, self._look)

    def _ended(self) -> None:
        # The guest must see the end now, so the write end goes; unread bytes are counted at a read
        # end, which nobody writes to any more and which therefore hides nothing from anybody.
        gauge = -1
        with contextlib.suppress(OSError):  # no descriptor left: then no more is acknowledged
            gauge = os.open(
                f"/proc/self/fd/{self._gauge}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            )
        self._release()
        self._gauge = gauge
        self._drained()

    def _drained(self) -> None:
        """After the FIN: the stream is at its end when the guest has read everything."""
        if not self._open and self._receiver.consumed == self._receiver.taken:
            self._forget()
            self._receiver.finish()
            self._on_end(End.FINISHED)

    def _broken(self) -> None:
        self.settle()  # what is in the pipe was never read
        super()._broken()
        self._forget()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._gauge >= 0 and self._gauge != self._port.fd:
            os.close(self._gauge)
        self._gauge = -1


class PeekSource:
    """Home's stdin → stream, without taking anything from it that the guest has not taken.

    Bytes are seen with tee(2) (a pipe) or MSG_PEEK (a socket), sent, and read away when they are
    acknowledged. So whoever reads next at home finds what the guest left. New bytes are noticed
    behind the ones already seen by edge triggering: every write to a pipe wakes its pollers.
    A pipe that is full of seen bytes shows nothing new before some are acknowledged, as at home.

    :param on_end: FINISHED when the guest has read everything to the end, RESET when it has closed
        its stdin; the descriptor is closed in both cases.
    :raises ValueError: `fd` is neither a pipe nor a socket.
    """

    def __init__(
        self, reactor: Reactor, sender: Sender, fd: int, *, on_end: OnEnd = _ignore
    ) -> None:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise ValueError("only pipes and sockets can be peeked at")
        self._sender = sender
        self._on_end = on_end
        self._port = _Port(fd, os.O_RDONLY)
        self._scratch = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if self._port.fifo else None
        self._taken = sender.acked  # offset up to which bytes were read away
        self._watch = _Watch(reactor, self._port.io, self._ready)
        self._hangup = select.poll()
        self._hangup.register(self._port.io, select.POLLRDHUP)
        self._open = True
        sender.on_ack = self._acked
        sender.on_reset = self._refused
        if sender.reset:
            reactor.defer(self._refused)
        else:
            self._watch.want(READ | select.EPOLLRDHUP | EDGE)

    def close(self) -> None:
        """Let go of both; what was not acknowledged stays in the pipe."""
        if self._open:
            self._open = False
            self._sender.on_ack = self._sender.on_reset = nothing
            self._watch.want(None)
            for fd in self._scratch or ():
                os.close(fd)
            self._port.close()

    def _ready(self, events: int) -> None:
        # Asked before looking: once the writers are gone, what we then see is all there is.
        last = bool(self._hangup.poll(0))
        seen = self._sender.end - self._taken
        room = self._sender.room
        if room or last:
            data = self._peek(seen, room)
            self._sender.write(data)
            seen += len(data)
        if last and not self._sender.fin and unread(self._port.io) <= seen:
            self._sender.finish()

    def _peek(self, seen: int, room: int) -> bytes:
        """At most `room` bytes that lie behind the `seen` ones."""
        there = unread(self._port.io)
        if there <= seen or not room:
            return b""
        if self._scratch is None:
            return self._port.peek(min(there, seen + room))[seen:]
        return self._tee(there, seen)[:room]

    def _tee(self, there: int, seen: int) -> bytes:
        assert self._scratch is not None
        out, into = self._scratch
        # As many slots as the pipe has: a slot may hold a single byte.
        size = fcntl.fcntl(self._port.io, fcntl.F_GETPIPE_SZ)
        if fcntl.fcntl(into, fcntl.F_GETPIPE_SZ) < size:
            with contextlib.suppress(OSError):  # beyond our limit: then less is seen at a time
                fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, size)
        count = _libc.tee(self._port.io, into, there, os.SPLICE_F_NONBLOCK)
        skipped = _throw_away(out, min(seen, count)) if count > 0 else 0
        return os.read(out, count - skipped) if count > skipped else b""

    def _acked(self) -> None:
        upto = min(self._sender.acked, self._sender.end)
        while self._taken < upto:
            count = self._read_away(upto - self._taken)
            if not count:
                # Somebody else at home has read them, as two readers of one pipe do.
                self._taken = upto
                break
            self._taken += count
        if self._sender.finished:
            self.close()
            self._on_end(End.FINISHED)
        else:
            self._ready(0)

    def _read_away(self, count: int) -> int:
        """Take at most so many bytes out; how many there were."""
        try:
            if self._port.fifo:
                return _throw_away(self._port.io, min(count, unread(self._port.io)))
            return len(self._port.read(count))
        except OSError:
            return 0

    def _refused(self) -> None:
        if self._open:
            self.close()
            self._on_end(End.RESET)


def _throw_away(pipe: int, count: int) -> int:
    """Take bytes out of a pipe without looking at them; how many there were."""
    left = count
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        while left > 0:
            gone = os.splice(pipe, null, left, flags=os.SPLICE_F_NONBLOCK)
            if not gone:
                break
            left -= gone
    except BlockingIOError:
        pass
    finally:
        os.close(null)
    return count - left


class Duplex:
    """Both directions of a private socket on one stream: the byte stream of SFTP.

    :param on_end: called once, when both directions have ended.
    """

    def __init__(
        self, reactor: Reactor, stream: Stream, fd: int, *, on_end: Callable[[], None] = nothing
    ) -> None:
        self._on_end = on_end
        self._left = 2
        copy = os.dup(fd)
        self.source = FdSource(reactor, stream.sender, copy, private=True, on_end=self._ended)
        self.sink = FdSink(reactor, stream.receiver, fd, private=True, on_end=self._ended)

    def close(self) -> None:
        self.source.close()
        self.sink.close()

    def _ended(self, end: End) -> None:
        self._left -= 1
        if not self._left:
            self._on_end()
