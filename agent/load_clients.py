"""load.sock: where the Mig library comes in. Who a client is, the kernel says (SO_PEERCRED).

A client's claims live as long as its connection. No task is spent on a request that can be answered
at once, as all can while this host leads.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from agent.load_central import failure
from agent.load_member import Client
from agent.load_service import LoadService
from migrate import mig_messages as mig
from migrate import paths
from migrate.errors import MigrateError, UserError
from migrate.framing import MALFORMED, FrameDecoder, FrameError, encode_frame

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
READ_BYTES = 1 << 16
MAX_REQUEST_BYTES = 1 << 19
MAX_BACKLOG_BYTES = 4 << 20
"""Of answers and events for a client that does not read: then it is dropped."""
MAX_QUEUED = 64
"""Requests of one client that wait for an earlier one."""
CONNECTIONS_PER_USER = 1024
GREETING_SECONDS = 10.0


class LoadClients:
    """Serves load.sock in the running loop, from `start` to `close`."""

    def __init__(
        self,
        service: LoadService,
        path: Path = paths.LOAD_SOCKET,
        inherited: socket.socket | None = None,
    ) -> None:
        """:param inherited: a listening socket that a service manager keeps while there is no migd."""
        self._service = service
        self._path = path
        self._inherited = inherited
        self._listener: socket.socket | None = None
        self._open: set[_Connection] = set()
        self._count: Counter[int] = Counter()

    def start(self) -> None:
        """Listen."""
        listener = self._inherited or self._listen()
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def _listen(self) -> socket.socket:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._path))
        # Every user may ask; what is granted depends on who asks.
        self._path.chmod(0o666)
        listener.listen(1024)
        return listener

    def close(self) -> None:
        """Stop listening, hang up."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            connection.close()

    def _accept(self) -> None:
        assert self._listener is not None
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    log.error("load socket: out of file descriptors")
                    self._pause()
                return
            sock.setblocking(False)
            _, uid, _ = _UCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )
            if self._count[uid] >= CONNECTIONS_PER_USER:
                refusal = UserError(f"uid {uid}", "has too many connections with migd")
                with suppress(OSError):
                    sock.send(encode_frame(mig.encode(failure(refusal))))
                sock.close()
                continue
            self._count[uid] += 1
            self._open.add(_Connection(self, self._service, sock, uid))

    def _pause(self) -> None:
        """Do not spin while a connection waits that cannot be accepted."""
        loop, listener = asyncio.get_running_loop(), self._listener
        assert listener is not None
        loop.remove_reader(listener.fileno())

        def resume() -> None:
            if self._listener is listener:
                loop.add_reader(listener.fileno(), self._accept)

        loop.call_later(1.0, resume)

    def forget(self, connection: _Connection, uid: int) -> None:
        """A connection has been closed."""
        self._open.discard(connection)
        self._count[uid] -= 1
        if not self._count[uid]:
            del self._count[uid]


class _Connection:
    """One client's."""

    def __init__(
        self, owner: LoadClients, service: LoadService, sock: socket.socket, uid: int
    ) -> None:
        self._owner = owner
        self._service = service
        self._sock = sock
        self._uid = uid
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder(MAX_REQUEST_BYTES)
        self._client: Client | None = None
        self._queue: deque[mig.Request] = deque()
        self._busy: asyncio.Task[None] | None = None
        self._backlog = bytearray()
        self._closed = False
        self._greeting = self._loop.call_later(GREETING_SECONDS, self.close)
        self._loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Hang up: its claims end."""
        if self._closed:
            return
        self._closed = True
        self._greeting.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        if self._busy is not None:
            self._busy.cancel()
        if self._client is not None:
            self._service.leave(self._client)
        self._owner.forget(self, self._uid)

    # ------------------------------------------------------------------ in

    def _readable(self) -> None:
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            self._queue += [mig.decode_request(frame) for frame in self._decoder.feed(data)]
        except (FrameError, *MALFORMED) as error:
            wrong = UserError("request", f"makes no sense to migd ({error})")
            self._send(failure(wrong))
            self.close()
            return
        self._work()
        if len(self._queue) > MAX_QUEUED:
            self._loop.remove_reader(self._sock.fileno())

    def _work(self) -> None:
        """Answer what is asked, in order, until one takes time."""
        while self._queue and self._busy is None and not self._closed:
            request = self._queue.popleft()
            if self._client is None:
                if not isinstance(request, mig.Open):
                    self._send(failure(UserError("request", "the first one must be Open")))
                    self.close()
                    return
                self._greeting.cancel()
                self._client = self._service.open(self._uid, self._send)
            reply = self._service.call(self._client, request)
            if isinstance(reply, Awaitable):
                self._busy = asyncio.create_task(self._wait_for(reply))
            else:
                self._send(reply)

    async def _wait_for(self, reply: Awaitable[mig.Reply]) -> None:
        try:
            self._send(await reply)
        except MigrateError as error:
            self._send(failure(error))
        except Exception:
            log.exception("load socket: a request failed")
            self.close()
        self._busy = None
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._work()

    # ------------------------------------------------------------------ out

    def _send(self, answer: mig.Answer) -> None:
        if self._closed:
            return
        data = encode_frame(mig.encode(answer))
        if not self._backlog:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._loop.call_soon(self.close)
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._sock.fileno(), self._writable)
        self._backlog += data
        if len(self._backlog) > MAX_BACKLOG_BYTES:
            log.info("load socket: a client of uid %d does not read; hung up", self._uid)
            self._loop.call_soon(self.close)

    def _writable(self) -> None:
        try:
            del self._backlog[: self._sock.send(self._backlog)]
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not self._backlog:
            self._loop.remove_writer(self._sock.fileno())
