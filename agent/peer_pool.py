"""Opens raw connections, and keeps a spare for each peer that was needed lately."""

import asyncio
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import msgspec

from agent.fdstream import FdStream, widen
from agent.peer_errors import PeerUnreachable
from agent.peer_hello import HELLO_LIMIT_BYTES, Hello, check_answer, encode_word
from agent.peer_identity import DEFAULT_IDENTITY, DEFAULT_PATIENCE, Identity, Patience
from agent.peer_raw import RawConnection, ssh_command
from criu_hooks.urgency import hurry
from migrate.config import Host
from migrate.errors import HostError, MigrateError

log = logging.getLogger(__name__)

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
"""ssh must not find an agent or a locale; its messages are read by agent.peer_raw."""

_LAST_WORDS_SECONDS = 2.0
"""How long ssh may take to end after its output has."""

REFILL_SECONDS = 2.0
"""After a connection was taken for a migration: not while the guest stands still."""

HANDSHAKES = 5
"""At once with one peer: its sshd drops some of more than ten (MaxStartups)."""


class RawPool:
    """Raw connections to peers, in the running loop, until `aclose`.

    Those that were taken belong to their takers: `aclose` does not touch them.
    """

    def __init__(
        self,
        own: Hello,
        identity: Identity = DEFAULT_IDENTITY,
        patience: Patience = DEFAULT_PATIENCE,
        *,
        spares: int = 1,
        command: Callable[[Host, Identity], Sequence[str]] = ssh_command,
    ) -> None:
        """:param spares: how many to keep ready for a peer once it was needed."""
        self._hello = encode_word(msgspec.structs.replace(own, use="raw"))
        self._identity = identity
        self._patience = patience
        self._wanted = spares
        self._command = command
        self._spares: dict[Host, list[RawConnection]] = {}
        self._handshakes: dict[Host, asyncio.Semaphore] = {}
        self._filling: dict[Host, asyncio.Task[None]] = {}
        self._expiry: dict[Host, asyncio.TimerHandle] = {}
        self._lost_at: dict[Host, float] = {}
        self._children: dict[int, RawConnection] = {}
        self._closed = False

    async def take(self, peer: Host, refill_seconds: float = 0.0) -> RawConnection:
        """A connection for the caller to own: the spare if there is one alive, else a new one.

        :param refill_seconds: when another spare is made, which takes a CPU for a while.
        :raises PeerUnreachable: none can be made; the reason is the peer's or ssh's.
        """
        spare = self._pop_spare(peer)
        if spare is None and (filling := self._filling.get(peer)) is not None:
            # One is on its way. Its failure is told by our own attempt.
            await asyncio.shield(filling)
            spare = self._pop_spare(peer)
        connection = spare or await self.open(peer)
        if refill_seconds:
            asyncio.get_running_loop().call_later(refill_seconds, self.prepare, peer)
        else:
            self.prepare(peer)
        return connection

    def distrust(self, peer: Host) -> None:
        """Another connection with this peer was lost: those made before may be dead, and not know it."""
        if not self._closed:
            self._lost_at[peer] = asyncio.get_running_loop().time()
            self._drop(peer)

    async def trusted(self, connection: RawConnection) -> RawConnection:
        """It, or a new one in its place if it is not to be trusted any more. Errors as `take`."""
        if connection.made_at > self._lost_at.get(connection.peer, 0.0):
            return connection
        connection.close()
        return await self.open(connection.peer)

    def prepare(self, peer: Host) -> None:
        """See to it, in the background, that there will be spares for this peer."""
        if self._closed:
            return
        if (timer := self._expiry.pop(peer, None)) is not None:
            timer.cancel()
        loop = asyncio.get_running_loop()
        self._expiry[peer] = loop.call_later(self._patience.spare_seconds, self._expire, peer)
        if peer not in self._filling and len(self._spares.get(peer, ())) < self._wanted:
            task = asyncio.create_task(self._fill(peer))
            self._filling[peer] = task
            task.add_done_callback(lambda _: self._filling.pop(peer, None))

    async def open(self, peer: Host) -> RawConnection:
        """A new connection, greeted by the peer's migd.

        :raises PeerUnreachable: it cannot be made; the reason is the peer's or ssh's.
        :raises HostError: this host cannot start ssh.
        """
        async with self._handshakes.setdefault(peer, asyncio.Semaphore(HANDSHAKES)):
            return await self._open(peer)

    async def _open(self, peer: Host) -> RawConnection:
        connection = self._start(peer)
        try:
            async with asyncio.timeout(self._patience.connect_seconds):
                await self._greet(connection)
        except TimeoutError:
            connection.close()
            limit = f"{self._patience.connect_seconds:g} s"
            reason = f"no connection within {limit}"
            raise PeerUnreachable(f"host {peer.name}", reason, "is it up, and its migd?") from None
        except BaseException:
            connection.close()
            raise
        return connection

    async def aclose(self) -> None:
        """Close the spares and stop opening new ones."""
        self._closed = True
        for timer in self._expiry.values():
            timer.cancel()
        self._expiry.clear()
        filling = list(self._filling.values())
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        for peer in list(self._spares):
            self._drop(peer)
        ending = [child.ended.wait() for child in self._children.values() if child.told_to_end]
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await asyncio.gather(*ending)
        loop = asyncio.get_running_loop()
        for pidfd in self._children:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        self._children.clear()

    def _pop_spare(self, peer: Host) -> RawConnection | None:
        spares = self._spares.get(peer, [])
        while spares:
            spare = spares.pop(0)
            if spare.alive():
                return spare
            spare.close()
        return None

    async def _fill(self, peer: Host) -> None:
        try:
            while len(self._spares.setdefault(peer, [])) < self._wanted:
                connection = await self.open(peer)
                if peer not in self._expiry:
                    connection.close()
                    return
                self._spares.setdefault(peer, []).append(connection)
        except MigrateError as error:
            log.info("no spare connection: %s", error)

    def _expire(self, peer: Host) -> None:
        self._expiry.pop(peer, None)
        self._drop(peer)

    def _drop(self, peer: Host) -> None:
        for spare in self._spares.pop(peer, []):
            spare.close()

    def _start(self, peer: Host) -> RawConnection:
        with ExitStack() as undo:
            try:
                to_us, from_ssh = _pair(undo)
                from_us, to_ssh = _pair(undo)
                widen(from_ssh.fileno())
                fd_err = os.memfd_create("ssh-stderr", os.MFD_CLOEXEC)
                undo.callback(os.close, fd_err)
                process = subprocess.Popen(
                    self._command(peer, self._identity),
                    stdin=to_ssh.fileno(),
                    stdout=from_ssh.fileno(),
                    stderr=fd_err,
                    cwd="/",
                    env=_ENVIRONMENT,
                    start_new_session=True,
                )
                undo.callback(process.kill)
                hurry(process.pid)
                pidfd = os.pidfd_open(process.pid)
            except OSError as error:
                raise HostError("ssh", f"cannot start: {error.strerror}") from error
            undo.pop_all()
            from_ssh.close()
            to_ssh.close()
        connection = RawConnection(peer, process, to_us.detach(), from_us.detach(), fd_err)
        self._children[pidfd] = connection
        asyncio.get_running_loop().add_reader(pidfd, self._reap, pidfd)
        return connection

    def _reap(self, pidfd: int) -> None:
        """However long after it was taken a connection ends, its ssh is our child."""
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        connection = self._children.pop(pidfd)
        connection.process.poll()
        connection.ended.set()

    async def _greet(self, connection: RawConnection) -> None:
        stream = FdStream(connection.fd_in, connection.fd_out)
        try:
            with suppress(OSError):
                await stream.write_frame(self._hello)
            payload = None
            with suppress(ConnectionError):
                payload = await stream.read_frame(HELLO_LIMIT_BYTES)
            if payload is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WORDS_SECONDS):
                        await connection.ended.wait()
                raise connection.failure()
            check_answer(payload, connection.peer.name)
            connection.greeted = True
            connection.made_at = asyncio.get_running_loop().time()
        finally:
            stream.release()


def _pair(undo: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    return undo.enter_context(ours), undo.enter_context(theirs)
