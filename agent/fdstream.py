"""Two descriptors as one connection for asyncio, which can be given away again without a loss.

asyncio's own streams read ahead, and want one transport for each direction; a connection that is
handed to another process must not have lost a byte to a buffer.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from types import TracebackType

from migrate.framing import MAX_FRAME_BYTES, encode_frame, read_frame

ROOM_BYTES = 1 << 20
"""The most that an unprivileged user may give a pipe (pipe(7), pipe-max-size)."""
SO_SNDBUFFORCE = 32


def widen(fd: int) -> None:
    """Give a pipe, or the writing end of a socket pair, more room, if the kernel allows it.

    For what sshd and ssh write to us: what does not fit they keep in a buffer that they enlarge in
    small steps, copying it each time; the first megabytes took 100 ms instead of 20.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, ROOM_BYTES)
        else:
            with socket.socket(fileno=os.dup(fd)) as end:
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, ROOM_BYTES)


class FdStream:
    """Owns `fd_in` and `fd_out` (pipes or sockets; they may be one and the same socket).

    One task may read and one write at a time. As a context manager it closes both.
    """

    def __init__(self, fd_in: int, fd_out: int) -> None:
        self.fd_in = fd_in
        self.fd_out = fd_out
        self._owned = True
        self._loop = asyncio.get_running_loop()
        self._writing = asyncio.Lock()
        self._waiting: set[asyncio.Event] = set()
        os.set_blocking(fd_in, False)
        os.set_blocking(fd_out, False)

    def __enter__(self) -> "FdStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both descriptors, unless they were given away. May be repeated.

        Tasks that still wait for them get an OSError.
        """
        if self._owned:
            self._disown()
            os.close(self.fd_in)
            os.close(self.fd_out)

    def release(self) -> tuple[int, int]:
        """Give both descriptors away, blocking as other programs expect them."""
        self._disown()
        os.set_blocking(self.fd_in, True)
        os.set_blocking(self.fd_out, True)
        return self.fd_in, self.fd_out

    async def read_some(self, limit_bytes: int = 1 << 16) -> bytes:
        """The next bytes, at most so many; empty at the end of the stream.

        :raises OSError: as read(2).
        """
        while True:
            self._check_owned()
            try:
                return os.read(self.fd_in, limit_bytes)
            except BlockingIOError:
                await self._ready(self.fd_in, self._loop.add_reader, self._loop.remove_reader)

    async def readexactly(self, n: int) -> bytes:
        """`n` bytes, and nothing beyond them is taken.

        :raises asyncio.IncompleteReadError: the stream ended before.
        """
        chunks: list[bytes] = []
        missing = n
        while missing:
            chunk = await self.read_some(missing)
            if not chunk:
                raise asyncio.IncompleteReadError(b"".join(chunks), n)
            chunks.append(chunk)
            missing -= len(chunk)
        return b"".join(chunks)

    async def read_frame(self, limit_bytes: int = MAX_FRAME_BYTES) -> bytes | None:
        """As migrate.framing.read_frame: None at the end."""
        return await read_frame(self, limit_bytes)

    async def write(self, data: bytes) -> None:
        """Write all of it. Tasks that write at once do so one after the other.

        :raises OSError: as write(2) (BrokenPipeError if nobody reads any more).
        """
        async with self._writing:
            rest = memoryview(data)
            while rest:
                self._check_owned()
                try:
                    rest = rest[os.write(self.fd_out, rest) :]
                except BlockingIOError:
                    await self._ready(self.fd_out, self._loop.add_writer, self._loop.remove_writer)

    async def write_frame(self, payload: bytes, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        """:raises FrameTooLarge: nothing was written."""
        await self.write(encode_frame(payload, limit_bytes))

    async def readable(self) -> None:
        """Wait until there is something to read, or the stream has ended."""
        await self._ready(self.fd_in, self._loop.add_reader, self._loop.remove_reader)

    def _disown(self) -> None:
        self._owned = False
        self._loop.remove_reader(self.fd_in)
        self._loop.remove_writer(self.fd_out)
        for waiting in self._waiting:
            waiting.set()

    async def _ready(
        self,
        fd: int,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], bool],
    ) -> None:
        ready = asyncio.Event()
        watch(fd, ready.set)
        self._waiting.add(ready)
        try:
            await ready.wait()
        finally:
            self._waiting.discard(ready)
            # Once disowned, the number may already be another file's.
            if self._owned:
                unwatch(fd)
        self._check_owned()

    def _check_owned(self) -> None:
        if not self._owned:
            raise OSError(errno.EBADF, "the stream is closed")
