"""The Mig library: what is known of the cluster's hosts, and the right to use idle ones.

It does what Sprite's Mig library (MIG(LIB), 1990) did, with exceptions in place of -1 and errno:

    from migrate import mig

    for host in mig.request_idle_hosts(4):
        start_something_on(host)
    mig.return_hosts(["node2"])

All functions block for as long as the daemon takes, which is milliseconds. The connection with migd
is made by the first call and made again when it breaks; what was held is claimed again then, and
what could not be had is told as an event. Claims end when the process does. Any user may call these.

For events there is a descriptor: `fileno()` becomes readable, and then `events()` returns them (and
calls the callback of `request_idle_hosts`). A process of several threads gives each its own `Mig`.

Errors are those of migrate.errors: UserError for what is not granted, HostError if migd cannot be
reached.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from migrate import mig_messages as messages
from migrate import paths
from migrate.errors import HostError, MigrateError, PeerError, UserError
from migrate.framing import MALFORMED, FrameDecoder, FrameError, encode_frame
from migrate.mig_messages import (
    Event,
    GiveBack,
    GuestCount,
    Held,
    HostInfo,
    HostLost,
    HostState,
    MoreHosts,
    Priority,
    Stats,
)

__all__ = [
    "MIG_HIGH_PRIORITY",
    "MIG_LOW_PRIORITY",
    "MIG_NORMAL_PRIORITY",
    "MIG_PROC_AGENT",
    "Event",
    "GiveBack",
    "GuestCount",
    "Held",
    "HostInfo",
    "HostLost",
    "HostState",
    "Mig",
    "MigrateError",
    "MoreHosts",
    "Priority",
    "Stats",
    "confirm_idle",
    "delete_host",
    "done",
    "events",
    "evict",
    "fileno",
    "get_all_info",
    "get_idle_node",
    "get_info",
    "get_pdev_name",
    "get_stats",
    "request_idle_hosts",
    "return_hosts",
]

MIG_LOW_PRIORITY = Priority.LOW
MIG_NORMAL_PRIORITY = Priority.NORMAL
MIG_HIGH_PRIORITY = Priority.HIGH
MIG_PROC_AGENT = 1
"""Flag of `request_idle_hosts`: the claim ends when the host sees the guest end, not with us."""

RECONNECT_SECONDS = 10.0
"""How long a call looks for a migd that does not run (it may just be restarting)."""
ANSWER_SECONDS = 30.0
_RETRY_SECONDS = 0.05
_READ_BYTES = 1 << 16

_BLAME: dict[str, type[MigrateError]] = {
    error.__name__: error for error in (UserError, HostError, PeerError)
}

R = TypeVar("R")
Callback = Callable[[], None]


class Mig:
    """A connection with migd, and the claims that hang on it. For one thread.

    A forked child shares its parent's connection: claims end when both have closed it or ended. Only
    one of them may go on using it.
    """

    def __init__(self, path: Path = paths.LOAD_SOCKET) -> None:
        self._path = path
        self._sock: socket.socket | None = None
        self._decoder = FrameDecoder(messages.MAX_FRAME_BYTES)
        self._events: deque[Event] = deque()
        self._frames: deque[bytes] = deque()
        self._held: list[Held] = []
        self._callback: Callback | None = None
        # Readable while there are events that were read along with an answer, or a lost connection.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch = select.epoll()
        self._watch.register(self._bell, select.EPOLLIN)

    def __enter__(self) -> Mig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: all claims end. May be repeated; nothing else may be called afterwards."""
        if not self._watch.closed:
            self._disconnect()
            self._watch.close()
            os.close(self._bell)

    @property
    def held(self) -> tuple[Held, ...]:
        """The claims of this connection."""
        return tuple(self._held)

    # ------------------------------------------------------------------ information

    def get_info(self, host: str | int | None = None) -> HostInfo:
        """The record of a host (Mig_GetInfo).

        :param host: its name or number; None for this host, which is answered without the central
            daemon (and so without the claims on it).
        :raises UserError: there is no such host.
        """
        if host is None:
            return self._call(messages.AskLocal(), messages.HostIs).info
        ask = messages.AskHost(id=host) if isinstance(host, int) else messages.AskHost(host)
        return self._call(ask, messages.HostIs).info

    def get_all_info(self) -> list[HostInfo]:
        """The records of all hosts, by number (Mig_GetAllInfo)."""
        return list(self._call(messages.AskAll(), messages.HostsAre).hosts)

    def get_stats(self) -> Stats:
        """What the central daemon has done since it took over (Mig_GetStats)."""
        return self._call(messages.AskStats(), messages.Stats)

    # ------------------------------------------------------------------ idle hosts

    def request_idle_hosts(
        self,
        count: int = 1,
        priority: Priority = MIG_NORMAL_PRIORITY,
        flags: int = 0,
        callback: Callback | None = None,
        *,
        exclude: Iterable[str] = (),
    ) -> list[str]:
        """Claim up to `count` idle hosts, those idle longest first (Mig_RequestIdleHosts).

        :param flags: 0 or MIG_PROC_AGENT.
        :param callback: called by `events` when there are more hosts, if too few were granted. It
            may ask for them, but others may be quicker.
        :param exclude: hosts that are not wanted.
        :return: their names; [] if there is none.
        """
        if flags & ~MIG_PROC_AGENT:
            raise UserError("flags", f"{flags} has a meaning that is not known here")
        agent = bool(flags & MIG_PROC_AGENT)
        wish = messages.RequestHosts(
            count, Priority(priority), agent, callback is not None, tuple(exclude)
        )
        hosts = list(self._call(wish, messages.Granted).hosts)
        self._callback = callback if len(hosts) < count else None
        self._held += [Held(host, Priority(priority), agent) for host in hosts]
        return hosts

    def confirm_idle(self, host: str) -> bool:
        """Whether a host that we hold is still available (Mig_ConfirmIdle); False on any error."""
        with suppress(MigrateError):
            return self._call(messages.Confirm(host), messages.Confirmed).available
        return False

    def return_hosts(self, hosts: Iterable[str] | None = None) -> int:
        """Give hosts back, or all of them (Mig_ReturnHosts). :return: how many we held."""
        names = None if hosts is None else tuple(hosts)
        for name in names if names is not None else ():
            self._drop(name)
        if names is None:
            self._held.clear()
        wish = messages.ReturnHosts(names or (), names is None)
        return self._call(wish, messages.Done).count

    def get_idle_node(self) -> int:
        """The number of an idle host, claimed for us; 0 if there is none (Mig_GetIdleNode)."""
        for name in self.request_idle_hosts(1):
            return self.get_info(name).id
        return 0

    def done(self, host: str | int) -> int:
        """Give one host back (Mig_Done). :return: 1, or 0 if we did not hold it."""
        return self.return_hosts([self.get_info(host).name if isinstance(host, int) else host])

    # ------------------------------------------------------------------ administration

    def delete_host(self, host: str) -> None:
        """Remove a host that is down from the database (Mig_DeleteHost). For root.

        :raises UserError: it is up, or not known, or we are not root.
        """
        self._call(messages.DeleteHost(host), messages.Done)

    def evict(self) -> int:
        """Have this host's guests sent home (Mig_Evict). For root and the host's owners.

        :return: how many they are.
        """
        return self._call(messages.Evict(), messages.Done).count

    def command(
        self,
        request: messages.SetLimits
        | messages.Block
        | messages.Bring
        | messages.Expel
        | messages.AwaitGone,
    ) -> int:
        """What `migctl` says to this host's migd. :return: of guests, where it is about those."""
        return self._call(request, messages.Done).count

    # ------------------------------------------------------------------ events

    def fileno(self) -> int:
        """A descriptor that is readable when `events` has something to return."""
        return self._watch.fileno()

    def events(self) -> list[Event]:
        """What has happened since the last call; does not wait. Calls the callback if it is due.

        If the connection was lost it is made again, which may take a moment.
        """
        self._read_what_is_there()
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        found = list(self._events)
        self._events.clear()
        for event in found:
            if isinstance(event, HostLost):
                self._drop(event.host)
        if self._callback is not None and any(isinstance(event, MoreHosts) for event in found):
            callback, self._callback = self._callback, None
            callback()
        return found

    def _read_what_is_there(self) -> None:
        while self._sock is not None and select.select([self._sock], [], [], 0)[0]:
            try:
                self._receive()
            except (OSError, FrameError):
                self._disconnect()
                self._connect(time.monotonic() + RECONNECT_SECONDS)
            for frame in self._take_frames():
                raise HostError("migd", f"an answer to no question ({len(frame)} bytes)")

    def _take_frames(self) -> list[bytes]:
        """Sorts events out. :return: the other frames."""
        others = []
        while self._frames:
            frame = self._frames.popleft()
            try:
                answer = messages.decode_answer(frame)
            except MALFORMED as error:
                raise HostError("migd", f"its answer makes no sense ({error})") from None
            if isinstance(answer, messages.EVENTS):
                self._events.append(answer)
                os.eventfd_write(self._bell, 1)
            else:
                others.append(frame)
        return others

    def _drop(self, host: str) -> None:
        for claim in self._held:
            if claim.host == host:
                self._held.remove(claim)
                return

    # ------------------------------------------------------------------ the connection

    def _call(self, request: messages.Request, kind: type[R]) -> R:
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                if self._sock is None:
                    self._connect(deadline)
                answer = self._exchange(request)
                break
            except (OSError, FrameError) as error:
                self._disconnect()
                if time.monotonic() > deadline:
                    raise HostError("migd", f"the connection broke ({error})") from None
        if isinstance(answer, messages.Failure):
            blame = _BLAME.get(answer.blame, MigrateError)
            raise blame(answer.what, answer.reason, answer.remedy)
        if not isinstance(answer, kind):
            raise HostError("migd", "it answers with something else", "restart it")
        return answer

    def _exchange(self, request: messages.Request) -> messages.Answer:
        assert self._sock is not None
        self._sock.sendall(encode_frame(messages.encode(request)))
        while True:
            for frame in self._take_frames():
                answer: messages.Answer = messages.decode_answer(frame)
                return answer
            self._receive()

    def _receive(self) -> None:
        assert self._sock is not None
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("migd hung up")
        self._frames += self._decoder.feed(data)

    def _connect(self, deadline: float) -> None:
        """Until `deadline`, by the monotonic clock: migd may just be restarting."""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(ANSWER_SECONDS)
            try:
                sock.connect(str(self._path))
                self._decoder = FrameDecoder(messages.MAX_FRAME_BYTES)
                self._frames.clear()
                self._sock = sock
                answer = self._exchange(messages.Open(held=tuple(self._held)))
                break
            except (OSError, FrameError) as error:
                sock.close()
                self._sock = None
                if time.monotonic() > deadline:
                    reason = getattr(error, "strerror", None) or str(error)
                    raise HostError(
                        "migd", f"cannot be reached ({reason})", "start it: systemctl start migd"
                    ) from None
                time.sleep(_RETRY_SECONDS)
        if isinstance(answer, messages.Failure):
            sock.close()
            self._sock = None
            raise _BLAME.get(answer.blame, MigrateError)(answer.what, answer.reason, answer.remedy)
        self._watch.register(sock, select.EPOLLIN)
        for claim in answer.lost if isinstance(answer, messages.Opened) else ():
            self._events.append(HostLost(claim.host, "the connection with migd was lost"))
            os.eventfd_write(self._bell, 1)

    def _disconnect(self) -> None:
        if self._sock is not None:
            with suppress(OSError, ValueError):
                self._watch.unregister(self._sock)
            self._sock.close()
            self._sock = None


# ---------------------------------------------------------------------- one connection for all

_default: Mig | None = None


def default() -> Mig:
    """The connection that the functions of this module use."""
    global _default
    if _default is None:
        _default = Mig()
    return _default


def get_info(host: str | int | None = None) -> HostInfo:
    """As Mig.get_info."""
    return default().get_info(host)


def get_all_info() -> list[HostInfo]:
    """As Mig.get_all_info."""
    return default().get_all_info()


def get_stats() -> Stats:
    """As Mig.get_stats."""
    return default().get_stats()


def request_idle_hosts(
    count: int = 1,
    priority: Priority = MIG_NORMAL_PRIORITY,
    flags: int = 0,
    callback: Callback | None = None,
    *,
    exclude: Iterable[str] = (),
) -> list[str]:
    """As Mig.request_idle_hosts."""
    return default().request_idle_hosts(count, priority, flags, callback, exclude=exclude)


def confirm_idle(host: str) -> bool:
    """As Mig.confirm_idle."""
    return default().confirm_idle(host)


def return_hosts(hosts: Iterable[str] | None = None) -> int:
    """As Mig.return_hosts."""
    return default().return_hosts(hosts)


def delete_host(host: str) -> None:
    """As Mig.delete_host."""
    default().delete_host(host)


def evict() -> int:
    """As Mig.evict."""
    return default().evict()


def get_idle_node() -> int:
    """As Mig.get_idle_node."""
    return default().get_idle_node()


def done(host: str | int) -> int:
    """As Mig.done."""
    return default().done(host)


def fileno() -> int:
    """As Mig.fileno."""
    return default().fileno()


def events() -> list[Event]:
    """As Mig.events."""
    return default().events()


def get_pdev_name(*, use_global: bool = False) -> str:
    """The path by which a daemon is reached (Mig_GetPdevName).

    :param use_global: that of the central daemon. It is the same socket: migd passes on what is for it.
    """
    return str(paths.LOAD_SOCKET)
