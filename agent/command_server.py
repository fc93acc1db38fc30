"""run.sock, where users of this host ask for commands to be run elsewhere.

One packet a connection, with the descriptors of the client's stdio. The socket itself then goes to the
command's guard, which answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from agent.fd_passing import close_all, receive_fds
from agent.repeated import Repeated
from migrate import paths
from migrate.command_wire import MAX_REQUEST, Reply, Request
from migrate.errors import MigrateError, UserError

log = logging.getLogger(__name__)

_UCRED = struct.Struct("3i")
DESCRIPTORS = 4
"""the command, stdin, stdout, stderr"""
BACKLOG = 256
REQUEST_SECONDS = 10.0
LINES_PER_USER = 10
CONNECTIONS_PER_USER = 256
"""That are not with their guards yet."""


@dataclass(frozen=True)
class Client:
    """Who asks, and with what. The descriptors belong to the server: take copies."""

    pid: int
    uid: int
    socket: socket.socket
    fds: tuple[int, ...]
    """as migrate.command_wire tells"""


Serve = Callable[[Request, Client], Awaitable[None]]


class CommandServer:
    """Serves run.sock in the running loop, from `start` to `close`.

    :param serve: has the command run; returns when a guard has taken over, or raises MigrateError.
    """

    def __init__(self, serve: Serve, path: Path = paths.RUN_SOCKET) -> None:
        self._serve_command = serve
        self._path = path
        self._socket: socket.socket | None = None
        self._open: Counter[int] = Counter()
        self._told = Repeated(log, burst=LINES_PER_USER)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen."""
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(self._path))
        # Every user may ask; what is granted depends on who asks.
        self._path.chmod(0o666)
        self._socket.listen(BACKLOG)
        self._socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening; requests under way are given up."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
        for task in self._tasks:
            task.cancel()

    def _accept(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            connection.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        fds: list[int] = []
        pid, uid, _ = _UCRED.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        self._open[uid] += 1
        try:
            if self._open[uid] > CONNECTIONS_PER_USER:
                raise UserError(f"uid {uid}", "has too many requests open", "wait for them")
            async with asyncio.timeout(REQUEST_SECONDS):
                await _readable(connection)
            data, fds, _ = receive_fds(connection, MAX_REQUEST, DESCRIPTORS)
            if not data:
                return
            request = Request.decode(data)
            if len(fds) != DESCRIPTORS:
                raise UserError("request", "lacks its descriptors")
            await self._serve_command(request, Client(pid, uid, connection, tuple(fds)))
        except MigrateError as error:
            self._told.say(logging.INFO, f"uid {uid}", str(error))
            reply(connection, Reply.refused(error))
        except (TimeoutError, OSError):
            log.debug("uid %d: a request broke off", uid)
        except Exception:
            log.exception("a request failed")
            reply(connection, Reply("refused", "migd", "internal error", "see its log"))
        finally:
            self._open[uid] -= 1
            if not self._open[uid]:
                del self._open[uid]
            close_all(fds)
            connection.close()


def reply(connection: socket.socket, answer: Reply) -> None:
    """Tell a client; it may be gone."""
    with contextlib.suppress(OSError):
        connection.send(answer.encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def call() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), call)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())
