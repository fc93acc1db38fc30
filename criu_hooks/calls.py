"""One CRIU call as its owner sees it: start it, answer its notifications, learn how it ended.

CRIU itself (`criu swrk`) is a child of the owner (a guard or a keeper), because what CRIU restores
becomes its sibling (rst_sibling). The owner does not speak protobuf: that would cost each of them
15 MB for good. A short-lived worker process (criu_hooks.worker) does it, over a socket that the
owner hands it:

    owner ──fork, exec──► criu swrk ◄──CRIU's RPC──► worker ◄──the messages below──► owner
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from criu_hooks.program import exec_swrk
from migrate.errors import CriuError

MAX_MESSAGE = 1 << 16
READY = "worker-ready"
"""The script name of the first Notify: the worker has started. It waits for no answer."""


class InheritFd(msgspec.Struct, frozen=True):
    """A descriptor that replaces a file of the images, e.g. ``pipe:[4711]`` (criu --inherit-fd)."""

    key: str
    fd: int
    """its number in the criu process"""


class DumpRequest(msgspec.Struct, frozen=True, tag="dump"):
    """criu dump: pages are sent to a page server socket, tasks left to the cgroup freezer."""

    pid: int
    images_fd: int
    """a directory descriptor of the process that made the RPC socket"""
    page_server_fd: int
    """its number in the criu process"""
    freeze_cgroup: str
    ghost_limit_bytes: int
    shell_job: bool
    log_path: str
    external: tuple[str, ...] = ()
    """files that are not part of the images, e.g. ``tty[8803:1c]`` (criu --external)"""


class RestoreRequest(msgspec.Struct, frozen=True, tag="restore"):
    """criu restore of images in a directory, as siblings of criu."""

    images_fd: int
    uid: int
    """whose every process in the images must be"""
    gids: tuple[int, ...]
    """of which they may have any; first the user's own"""
    mounts_fd: int
    """a handle of the mount namespace that criu is in"""
    inherit_fds: tuple[InheritFd, ...]
    shell_job: bool
    log_path: str
    view: tuple[str, ...] = ()
    """directories of files that may have changed since, by others"""
    view_device: int = 0
    """where these lie, as st_dev; 0: on this host"""
    session_leader: int = 0
    """a process in the images that leads its terminal's session"""
    foreground: int = 0
    """the group that shall have that terminal"""


class FeatureRequest(msgspec.Struct, frozen=True, tag="version"):
    """Asks CRIU for its version."""


Request = DumpRequest | RestoreRequest | FeatureRequest


class Notify(msgspec.Struct, frozen=True, tag="notify"):
    """CRIU reached a point and waits for `proceed`.

    `script`: the point, as criu's action scripts are told it, e.g. ``post-dump``.
    """

    script: str
    pid: int = 0


class Proceed(msgspec.Struct, frozen=True, tag="proceed"):
    """The answer to a Notify; ``ok=False`` makes CRIU undo what it has done."""

    ok: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    """CRIU finished.

    `reason`: one sentence when it failed; the whole log stays at the request's log_path.
    """

    ok: bool
    reason: str = ""


Event = Notify | Done

_encode = msgspec.msgpack.Encoder().encode
_decode_event: Callable[[bytes], Event] = msgspec.msgpack.Decoder(Event).decode


def spawn_swrk(
    rpc: socket.socket,
    keep_fds: Sequence[int],
    prepare: Callable[[], None],
    fork: Callable[[], int] = os.fork,
) -> int:
    """Fork `criu swrk` as a child of the caller and return its pid.

    :param rpc: CRIU's end of the RPC socket pair.
    :param keep_fds: descriptors that criu inherits under the same numbers.
    :param prepare: runs in the child before exec (enter namespaces, take identities). What it
        raises ends the child with status 127; the caller sees the closed RPC socket.
    """
    pid = fork()
    if pid:
        return pid
    try:
        prepare()
        for fd in (*keep_fds, rpc.fileno()):
            os.set_inheritable(fd, True)
        exec_swrk(rpc.fileno())
    except BaseException as error:
        os.write(2, f"criu could not be started: {error}\n".encode())
    os._exit(127)


class CriuCall:
    """A worker process, started early so that its imports freeze nobody longer; then one call."""

    def __init__(self, worker: socket.socket | None = None) -> None:
        """:param worker: the connection with one that runs already; else one is started."""
        self._worker: subprocess.Popen[bytes] | None = None
        if worker is None:
            worker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._worker = subprocess.Popen(
                    [sys.executable, "-I", "-m", "criu_hooks.worker"],
                    stdin=theirs.fileno(),
                    close_fds=True,
                )
        self._channel = worker
        self._maker = os.getpid()
        self._rpc: socket.socket | None = None
        self._criu_end: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when `receive` will not block."""
        return self._channel.fileno()

    @property
    def criu_end(self) -> socket.socket:
        """CRIU's end of the RPC socket, for `spawn_swrk`.

        Made at the first use: criu finds the images through /proc by the pid that made the socket,
        so that must be a process which lives in criu's own pid namespace.
        """
        if self._criu_end is None:
            self._rpc, self._criu_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return self._criu_end

    def renew(self) -> None:
        """Forget a criu that was started too early; the next `criu_end` is another's."""
        for end in (self._rpc, self._criu_end):
            if end is not None:
                end.close()
        self._rpc = self._criu_end = None

    def begin(self, request: Request) -> None:
        """Send the request to CRIU, which was started by `spawn_swrk` with `criu_end`."""
        if self._rpc is None or self._criu_end is None:
            raise RuntimeError("spawn_swrk comes first")
        self._criu_end.close()
        fds = [self._rpc.fileno()]
        if isinstance(request, RestoreRequest):
            fds += (request.images_fd, request.mounts_fd)
        socket.send_fds(self._channel, [_encode(request)], fds)
        self._rpc.close()

    def receive(self, timeout_seconds: float | None = None) -> Event:
        """The next event. A worker or criu that died is a failed Done.

        :raises TimeoutError: nothing came within `timeout_seconds`.
        """
        self._channel.settimeout(timeout_seconds)
        try:
            data = self._channel.recv(MAX_MESSAGE)
        except ConnectionError:
            data = b""
        if not data:
            return Done(ok=False, reason="the process that talks to CRIU was killed")
        return _decode_event(data)

    def proceed(self, ok: bool = True) -> None:
        """Answer the last Notify. A worker that is gone shows at the next `receive`."""
        try:
            self._channel.send(_encode(Proceed(ok)))
        except OSError:
            return

    def run_until(self, script: str, timeout_seconds: float) -> None:
        """Answer notifications until `script` is reached. Raises CriuError if CRIU ends before."""
        while True:
            event = self.receive(timeout_seconds)
            if isinstance(event, Done):
                raise CriuError("criu", event.reason or f"ended before {script}")
            if event.script == script:
                return
            self.proceed()

    def finish(self, timeout_seconds: float) -> None:
        """Answer what is left and wait for the end. Raises CriuError if CRIU failed."""
        while True:
            event = self.receive(timeout_seconds)
            if isinstance(event, Done):
                if not event.ok:
                    raise CriuError("criu", event.reason)
                return
            self.proceed()

    def close(self) -> None:
        """End the worker. CRIU sees its RPC socket closed and undoes what it has not finished."""
        for end in (self._channel, self._rpc, self._criu_end):
            if end is not None:
                end.close()
        if self._worker is None or os.getpid() != self._maker:
            return  # it ends by itself, or is the child of the process that was forked
        if self._worker.poll() is None:
            self._worker.kill()
        self._worker.wait()
