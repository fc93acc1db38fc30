"""The control connection to a peer: questions and answers, over one connection that is re-made.

paramiko has threads and blocks; migd is asyncio. So each connection has a thread that reads and one
that writes, and everything else happens in the loop.
"""

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from agent.control_frame import (
    MAX_PAYLOAD_BYTES,
    ControlFrame,
    Kind,
    decode_control,
    decode_error,
    encode_control,
)
from agent.peer_dial import Line, connect_tcp, dial
from agent.peer_errors import AnswerLost, ConnectionCut, PeerUnreachable
from agent.peer_hello import Hello
from agent.peer_identity import DEFAULT_IDENTITY, DEFAULT_PATIENCE, Identity, Patience
from agent.wire import nothing
from migrate.config import Host
from migrate.errors import MigrateError
from migrate.framing import FrameDecoder, FrameError, FrameTooLarge, encode_frame

log = logging.getLogger(__name__)

Connect = Callable[[Host, float], socket.socket]

_READ_BYTES = 1 << 16

T = TypeVar("T")


class ControlConnection:
    """Questions for one peer. Connects when it is needed, and again when that was lost."""

    def __init__(
        self,
        peer: Host,
        own: Hello,
        identity: Identity = DEFAULT_IDENTITY,
        patience: Patience = DEFAULT_PATIENCE,
        *,
        connect: Connect = connect_tcp,
        on_lost: Callable[[], None] = nothing,
    ) -> None:
        """:param on_lost: called when a connection that stood is lost."""
        self.peer = peer
        self._own = own
        self._identity = identity
        self._patience = patience
        self._connect = connect
        self._on_lost = on_lost
        self._link: _Link | None = None
        self._linking: asyncio.Task[_Link] | None = None
        self._begun = 0.0
        self._not_before = 0.0
        """When the next attempt may be made, in the loop's time."""

    @property
    def connected(self) -> bool:
        """Whether a connection stands that is not known to be dead."""
        return self._link is not None and self._link.lost is None

    async def hello(self) -> Hello:
        """The peer's greeting on the connection that stands, or that is made now.

        :raises PeerUnreachable: none can be made.
        """
        return (await self._current()).hello

    async def request(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Ask the peer. `timeout_seconds` covers all, connecting too.

        :raises PeerUnreachable: it was not asked: no connection.
        :raises AnswerLost: it was asked; it may or may not have acted.
        :raises MigrateError: the peer's own answer, of the class it was raised with there.
        :raises FrameTooLarge: the payload is.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise FrameTooLarge(len(payload), MAX_PAYLOAD_BYTES)
        link: _Link | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                link = await self._current()
                return await link.request(payload)
        except TimeoutError:
            kind = PeerUnreachable if link is None else AnswerLost
            reason = f"no answer within {timeout_seconds:g} s"
            raise kind(f"host {self.peer.name}", reason, "is it up, and its migd?") from None

    def close(self) -> None:
        """End the connection; questions without answer raise AnswerLost."""
        if self._linking is not None:
            self._linking.cancel()
        if self._link is not None:
            self._link.lose(AnswerLost(f"host {self.peer.name}", "migd is ending here"))

    async def _current(self) -> "_Link":
        """What an attempt has found that began before somebody asked is no answer for him."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while True:
            if self._link is not None and self._link.lost is None:
                return self._link
            if self._linking is None:
                if (wait := self._not_before - loop.time()) > 0:
                    await asyncio.sleep(wait)
                    continue
                self._begun = loop.time()
                self._linking = asyncio.create_task(self._make())
                self._linking.add_done_callback(self._made)
            linking, begun = self._linking, self._begun
            try:
                return await asyncio.shield(linking)
            except asyncio.CancelledError:
                if linking.cancelled():
                    raise PeerUnreachable(f"host {self.peer.name}", "migd is ending here") from None
                raise
            except MigrateError:
                if begun >= asked:
                    raise

    async def _make(self) -> "_Link":
        def blocking() -> Line:
            sock = self._connect(self.peer, self._patience.connect_seconds)
            return dial(self.peer, self._own, self._identity, self._patience, sock)

        name = self.peer.name
        line = await _in_thread(f"dial-{name}", blocking, Line.close)
        log.info("host %s: connected", name)
        return _Link(name, line, self._patience, self._on_lost)

    def _made(self, task: "asyncio.Task[_Link]") -> None:
        self._linking = None
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._link = task.result()
        else:
            now = asyncio.get_running_loop().time()
            self._not_before = now + self._patience.retry_after_seconds


class _Link:
    """One connection that stands, until `lost` says why it does not any more."""

    def __init__(
        self, peer: str, line: Line, patience: Patience, on_lost: Callable[[], None]
    ) -> None:
        self.hello = line.hello
        self.lost: MigrateError | None = None
        self._peer = peer
        self._line = line
        self._patience = patience
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(patience.ping_after_seconds, self._check)
        for job in (self._read, self._write):
            name = f"{job.__name__.strip('_')}-{peer}"
            threading.Thread(target=job, name=name, daemon=True).start()

    async def request(self, payload: bytes) -> bytes:
        if self.lost is not None:
            raise self.lost
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._waiting[number] = answer
        try:
            self._send(ControlFrame(Kind.REQUEST, number, payload))
            return await answer
        finally:
            self._waiting.pop(number, None)

    def lose(self, error: MigrateError) -> None:
        """The connection is over: tell all who wait, and let its threads end."""
        if self.lost is not None:
            return
        self.lost = error
        self._timer.cancel()
        log.info("%s", error)
        self._on_lost()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        self._outgoing.put(None)
        # Closing waits for paramiko's thread.
        threading.Thread(target=self._line.close, name=f"close-{self._peer}", daemon=True).start()

    def _lose(self, reason: str) -> None:
        self.lose(AnswerLost(f"host {self._peer}", reason))

    def _cut(self, reason: str) -> None:
        self.lose(ConnectionCut(f"host {self._peer}", reason))

    def _send(self, frame: ControlFrame) -> None:
        self._outgoing.put(encode_frame(encode_control(frame)))

    def _check(self) -> None:
        """Ask for a sign of life after a silence; give up after too long a one."""
        silent = self._loop.time() - self._heard_at
        limit = self._patience.ping_after_seconds + self._patience.answer_seconds
        if silent >= limit:
            self._lose(f"no sign of life for {silent:.0f} s")
            return
        if silent >= self._patience.ping_after_seconds:
            self._send(ControlFrame(Kind.PING, 0))
            wait = limit - silent
        else:
            wait = self._patience.ping_after_seconds - silent
        self._timer = self._loop.call_later(wait, self._check)

    def _received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        try:
            for payload in self._decoder.feed(data):
                self._handle(decode_control(payload))
        except (FrameError, ValueError) as error:
            self._lose(f"it does not speak our protocol: {error}")

    def _handle(self, frame: ControlFrame) -> None:
        if frame.kind is Kind.PONG:
            return
        answer = self._waiting.get(frame.number)
        if answer is None or answer.done():
            return  # Somebody asked, and did not wait for the answer.
        if frame.kind is Kind.ANSWER:
            answer.set_result(frame.payload)
        elif frame.kind is Kind.ERROR:
            answer.set_exception(decode_error(frame.payload, self._peer))
        else:
            raise ValueError(f"unexpected {frame.kind.name}")

    def _read(self) -> None:
        """A thread's: bytes from the channel to the loop."""
        with suppress(OSError):
            while data := self._line.channel.recv(_READ_BYTES):
                self._tell(self._received, data)
        self._tell(self._cut, "the connection was lost")

    def _write(self) -> None:
        """A thread's: frames from the loop to the channel."""
        try:
            while (data := self._outgoing.get()) is not None:
                self._line.channel.sendall(data)
        except (OSError, EOFError):  # paramiko raises both.
            self._tell(self._cut, "the connection was lost")

    def _tell(self, what: Callable[[T], None], about: T) -> None:
        with suppress(RuntimeError):  # The loop has ended, and nobody waits any more.
            self._loop.call_soon_threadsafe(what, about)


async def _in_thread(name: str, work: Callable[[], T], discard: Callable[[T], None]) -> T:
    """Run `work` in a daemon thread; if we are cancelled, its result is given to `discard` there.

    Not asyncio.to_thread: at its end a program would wait for a peer that does not answer.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def succeed(value: T) -> None:
        if result.done():
            threading.Thread(target=discard, args=(value,), daemon=True).start()
        else:
            result.set_result(value)

    def fail(error: BaseException) -> None:
        if not result.done():
            result.set_exception(error)

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            with suppress(RuntimeError):  # The loop has ended, and nobody waits any more.
                loop.call_soon_threadsafe(fail, error)
            return
        try:
            loop.call_soon_threadsafe(succeed, value)
        except RuntimeError:
            discard(value)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await result
