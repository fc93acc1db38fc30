"""Has guards, keepers and CRIU workers forked by agent/forkserver.py, and starts that when it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec

from agent.fd_passing import close_all, receive_fds
from migrate import paths

AGENTS = "agents"
WORKERS = "workers"
ANSWER_SECONDS = 5.0
BACKLOG = 64
TITLE_ROOM = 160
"""Bytes of an argument that only makes room for the names of those who are forked."""


class Birth(msgspec.Struct, frozen=True):
    """Who is to be born."""

    role: str
    """guard or keeper"""
    words: tuple[str, ...]
    """its arguments"""


def socket_path(kind: str) -> Path:
    """Where the server of that kind listens; for root alone."""
    return paths.RUN_DIR / f"{kind}.sock"


def connect(kind: str) -> socket.socket | None:
    """A connection with somebody newly born; None if no server runs."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(socket_path(kind)))
    except OSError:
        sock.close()
        return None
    return sock


def bear(birth: Birth, link: socket.socket) -> tuple[int, int] | None:
    """Have a guard or keeper forked.

    :param link: its end of the link.
    :returns: its pid and a pidfd; None if no server runs.
    """
    sock = connect(AGENTS)
    if sock is None:
        return None
    with sock:
        sock.settimeout(ANSWER_SECONDS)
        try:
            socket.send_fds(sock, [msgspec.msgpack.encode(birth)], [link.fileno()])
            data, fds, _ = receive_fds(sock, 16, 1)
        except OSError:
            return None
        if len(fds) != 1:
            close_all(fds)
            return None
        return int(data), fds[0]


class ForkServer:
    """One server, as migd sees it: started when it is needed."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._process: subprocess.Popen[bytes] | None = None

    def need(self) -> None:
        """See to it that there will be one soon."""
        if self._process is not None and self._process.poll() is None:
            return
        path = socket_path(self._kind)
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            # The mode of an unbound socket is what bind gives its file: never open for a moment.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(str(path))
            listener.listen(BACKLOG)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "agent.forkserver", self._kind, " " * TITLE_ROOM],
                stdin=listener.fileno(),
                stdout=2,
                cwd="/",
                start_new_session=True,
            )

    def close(self) -> None:
        """End it; those whom it has forked live on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            socket_path(self._kind).unlink(missing_ok=True)
