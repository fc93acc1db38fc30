"""The receiving end of peers' connections: the socket that agent/bridge.py hands them to.

Who a peer is has been proved to sshd by its key; the bridge passes on the name that belongs to the
key. Only the user `migrate`, whose only program is the bridge, and root may speak here.
"""

import asyncio
import errno
import logging
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from agent.control_frame import (
    MAX_PAYLOAD_BYTES,
    ControlFrame,
    Kind,
    decode_control,
    encode_control,
    encode_error,
)
from agent.fd_passing import close_all, receive_fds
from agent.fdstream import FdStream, widen
from agent.peer_hello import (
    HELLO_LIMIT_BYTES,
    Hello,
    Purpose,
    Refusal,
    check_caller,
    decode_word,
    encode_word,
)
from agent.repeated import Repeated
from migrate import paths
from migrate.errors import HostError, MigrateError, PeerError
from migrate.framing import FrameDecoder, encode_frame

log = logging.getLogger(__name__)

_UCRED = struct.Struct("iII")


@dataclass(frozen=True)
class IncomingConnection:
    """A raw connection from a peer; whoever gets it owns its three descriptors.

    `fd_hold` keeps sshd's side alive: the connection ends when it is closed, so it belongs in the
    same hands as the other two. `fd_in` and `fd_out` are blocking; not a byte after the Purpose
    has been read from `fd_in`.
    """

    peer: str
    purpose: str
    token: str
    fd_in: int
    fd_out: int
    fd_hold: int

    def close(self) -> None:
        """Close all three here (after they were passed to another process, or to give up)."""
        for fd in (self.fd_in, self.fd_out, self.fd_hold):
            os.close(fd)


Serve = Callable[[str, bytes], Awaitable[bytes]]
"""Answers a request of the named peer; a MigrateError it raises is the answer, too."""
ServeAtOnce = Callable[[str, bytes], bytes | None]
Receive = Callable[[IncomingConnection], Awaitable[None]]


@dataclass(frozen=True)
class Bounds:
    """How much a peer may ask of us at once, and how long it may be silent (seconds)."""

    greeting_seconds: float = 10.0
    control_silence_seconds: float = 30.0
    spare_seconds: float = 900.0
    """More than a caller keeps a spare (Patience.spare_seconds): it goes first."""
    connections: int = 16
    """For each peer: control connections and spares; not those already in use."""
    requests: int = 64
    """For each control connection, unanswered."""


class PeerServer:
    """Serves the peer socket in the running loop, from `start` to `aclose`."""

    def __init__(
        self,
        own: Hello,
        is_peer: Callable[[str], bool],
        serve: Serve,
        receive: Receive,
        *,
        serve_at_once: ServeAtOnce = lambda peer, payload: None,
        control_ended: Callable[[str], None] = lambda peer: None,
        path: Path = paths.PEER_SOCKET,
        group_id: int | None = None,
        allowed_uids: frozenset[int] = frozenset({0}),
        bounds: Bounds = Bounds(),
    ) -> None:
        """
        :param is_peer: whether a host of this name is configured now.
        :param serve: answers requests on control connections. Runs to its end even if the peer
            goes away meanwhile; then its answer is dropped.
        :param receive: takes a raw connection over, descriptors and all.
        :param serve_at_once: asked before `serve`; None if it has no answer at once. It must not fail
            but with a MigrateError.
        :param control_ended: told when the last control connection of a peer has ended.
        :param group_id: the group that may connect (that of the user `migrate`).
        :param allowed_uids: who may connect (root and the user `migrate`).
        """
        self._own = own
        self._is_peer = is_peer
        self._serve = serve
        self._receive = receive
        self._serve_at_once = serve_at_once
        self._control_ended = control_ended
        self._path = path
        self._group_id = group_id
        self._allowed_uids = allowed_uids
        self._bounds = bounds
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: Counter[str] = Counter()
        self._controls: Counter[str] = Counter()
        self._told = Repeated(log)

    def start(self) -> None:
        """Listen, in the running loop.

        :raises HostError: the socket cannot be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            # The mode of an unbound socket is what bind gives its file: never open for a moment.
            os.fchmod(listener.fileno(), 0o600)
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            if self._group_id is not None:
                os.chown(self._path, -1, self._group_id)
            self._path.chmod(0o660)
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise HostError(str(self._path), f"cannot listen: {error.strerror}") from error
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    async def aclose(self) -> None:
        """Stop listening, end all connections that were not handed on, and all handlers."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None  # its file stays: who comes now waits for our successor
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                log.error("peer socket: out of file descriptors")
                self._pause()
            return
        self._spawn(self._greet(sock))

    def _pause(self) -> None:
        """Do not spin while a connection waits that cannot be accepted."""
        loop, listener = asyncio.get_running_loop(), self._listener
        assert listener is not None
        loop.remove_reader(listener.fileno())

        def resume() -> None:
            if self._listener is listener:
                loop.add_reader(listener.fileno(), self._accept)

        loop.call_later(1.0, resume)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("peer connection failed", exc_info=error)

    async def _greet(self, sock: socket.socket) -> None:
        with sock:
            sock.setblocking(False)
            _, uid, _ = _UCRED.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )
            if uid not in self._allowed_uids:
                self._told.say(logging.WARNING, f"uid {uid}", "may not use the peer socket")
                return
            try:
                async with asyncio.timeout(self._bounds.greeting_seconds):
                    peer, fd_in, fd_out = await _receive_bridge(sock)
            except (OSError, ValueError) as error:
                reason = f"no connection in the message: {error or 'timed out'}"
                self._told.say(logging.WARNING, "peer socket", reason)
                return
            with FdStream(fd_in, fd_out) as stream:
                self._held[peer] += 1
                try:
                    await self._attend(sock, peer, stream)
                except (OSError, EOFError, ValueError, MigrateError) as error:
                    reason = f"connection ended: {error or 'timed out'}"
                    self._told.say(logging.INFO, f"host {peer}", reason)
                finally:
                    self._held[peer] -= 1
                    if not self._held[peer]:
                        del self._held[peer]

    async def _attend(self, sock: socket.socket, peer: str, stream: FdStream) -> None:
        async with asyncio.timeout(self._bounds.greeting_seconds):
            payload = await stream.read_frame(HELLO_LIMIT_BYTES)
            if payload is None:
                return
            try:
                hello = self._judge(payload, peer)
            except PeerError as error:
                refusal = Refusal(error.reason, error.remedy)
                await stream.write_frame(encode_word(refusal))
                raise
            await stream.write_frame(encode_word(self._own))
        if hello.use == "control":
            self._controls[peer] += 1
            try:
                await self._serve_control(peer, stream)
            finally:
                self._controls[peer] -= 1
                if not self._controls[peer]:
                    del self._controls[peer]
                    self._control_ended(peer)
        else:
            for fd in (stream.fd_in, stream.fd_out):
                widen(fd)
            await self._await_purpose(sock, peer, stream)

    def _judge(self, payload: bytes, peer: str) -> Hello:
        if not self._is_peer(peer):
            raise PeerError(
                f"host {peer}",
                f"host {self._own.host} does not list {peer}",
                f"run `migctl join {peer}` there",
            )
        if self._held[peer] > self._bounds.connections:
            raise PeerError(f"host {peer}", "too many connections from it at once")
        return check_caller(payload, peer, self._own.host)

    async def _await_purpose(self, sock: socket.socket, peer: str, stream: FdStream) -> None:
        async with asyncio.timeout(self._bounds.spare_seconds):
            payload = await stream.read_frame(HELLO_LIMIT_BYTES)
        if payload is None:
            return
        word = decode_word(payload)
        if not isinstance(word, Purpose):
            raise ValueError("no purpose given")
        fd_in, fd_out = stream.release()
        connection = IncomingConnection(
            peer, word.purpose, word.token, fd_in, fd_out, sock.detach()
        )
        await self._receive(connection)

    async def _serve_control(self, peer: str, stream: FdStream) -> None:
        log.info("host %s: control connection", peer)
        silence_seconds = self._bounds.control_silence_seconds
        # It is never handed on, so it may be read ahead.
        decoder = FrameDecoder()
        open_requests: set[int] = set()
        while True:
            async with asyncio.timeout(silence_seconds):
                data = await stream.read_some()
            if not data:
                decoder.finish()
                return
            answers = []
            for payload in decoder.feed(data):
                answer = self._meet(peer, stream, decode_control(payload), open_requests)
                if answer is not None:
                    answers.append(encode_frame(encode_control(answer)))
            if answers:
                async with asyncio.timeout(silence_seconds):
                    await stream.write(b"".join(answers))

    def _meet(
        self, peer: str, stream: FdStream, frame: ControlFrame, open_requests: set[int]
    ) -> ControlFrame | None:
        """What can be answered at once is; for the rest a task is begun, and None returned."""
        number = frame.number
        if frame.kind is Kind.PING:
            return ControlFrame(Kind.PONG, number)
        if frame.kind is not Kind.REQUEST or number in open_requests:
            raise ValueError(f"unexpected {frame.kind.name} {number}")
        try:
            quick = self._serve_at_once(peer, frame.payload)
        except MigrateError as error:
            return ControlFrame(Kind.ERROR, number, encode_error(error))
        if quick is not None:
            return ControlFrame(Kind.ANSWER, number, quick)
        if len(open_requests) >= self._bounds.requests:
            refusal = PeerError(f"host {self._own.host}", "too many requests at once")
            return ControlFrame(Kind.ERROR, number, encode_error(refusal))
        open_requests.add(number)
        self._spawn(self._answer(peer, stream, frame, open_requests))
        return None

    async def _answer(
        self, peer: str, stream: FdStream, request: ControlFrame, open_requests: set[int]
    ) -> None:
        answer = await self._work_out(peer, request)
        open_requests.discard(request.number)
        try:
            await _say(stream, answer)
        except OSError:
            log.info("host %s: gone before its answer", peer)

    async def _work_out(self, peer: str, request: ControlFrame) -> ControlFrame:
        number = request.number
        try:
            answer = await self._serve(peer, request.payload)
            if len(answer) > MAX_PAYLOAD_BYTES:
                raise ValueError(f"an answer of {len(answer)} bytes")
            return ControlFrame(Kind.ANSWER, number, answer)
        except MigrateError as error:
            return ControlFrame(Kind.ERROR, number, encode_error(error))
        except Exception:
            log.exception("host %s: a request failed", peer)
            failure = HostError(f"host {self._own.host}", "internal error", "see migd's log there")
            return ControlFrame(Kind.ERROR, number, encode_error(failure))


async def _say(stream: FdStream, frame: ControlFrame) -> None:
    await stream.write_frame(encode_control(frame))


async def _receive_bridge(sock: socket.socket) -> tuple[str, int, int]:
    """The peer's name and the two descriptors from the bridge's one message.

    :raises ValueError: it is no such message; nothing of it stays open.
    """
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock.fileno())
    name, fds, cut_short = receive_fds(sock, 256, 2)
    try:
        if len(fds) != 2 or cut_short:
            raise ValueError(f"{len(fds)} descriptors, 2 expected")
        for fd in fds:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                raise ValueError("a descriptor is neither a socket nor a pipe")
        return name.decode(), fds[0], fds[1]
    except ValueError:
        close_all(fds)
        raise
