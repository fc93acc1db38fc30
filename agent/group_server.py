"""Has the group files served (agent/group_files.py), and answers the questions of who serves them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from agent import group_words, syscalls
from agent.group_words import Get, Identity, Mounted, Put
from migrate import paths
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

MOUNT_SECONDS = 10.0
END_SECONDS = 5.0


class GroupServer:
    """For the running loop, from `start` to `close`. No file below the mount is ever touched here: who
    serves it waits for this loop."""

    def __init__(
        self,
        get: Callable[[Identity], int],
        put: Callable[[Identity, int], None],
        directory: Path = paths.GROUP_FILES,
    ) -> None:
        self._get = get
        self._put = put
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._mounted = asyncio.Event()

    def start(self) -> None:
        """Have them mounted."""
        self._spawn()

    async def mounted(self) -> None:
        """Return when the files are there; if they cannot be, that is logged."""
        try:
            async with asyncio.timeout(MOUNT_SECONDS):
                await self._mounted.wait()
        except TimeoutError:
            log.error("%s: not mounted; groups can be had by joingroup", self._directory)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-m",
                    "agent.group_files",
                    str(self._directory),
                    str(os.getpid()),
                ],
                stdin=theirs.fileno(),
                stdout=2,
                cwd="/",
            )
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable, ours)

    def _readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(group_words.MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._ended()
            return
        try:
            packet = group_words.decode(data)
        except MALFORMED as error:
            log.error("group files: a question that makes no sense: %s", error)
            self._ended()
            return
        match packet:
            case Mounted():
                self._mounted.set()
            case Get(process):
                self._answer(sock, self._get(process))
            case Put(process, group):
                self._put(process, group)
                self._answer(sock, group)

    def _answer(self, sock: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            sock.send(group_words.encode_answer(number))

    def _ended(self) -> None:
        """It was killed: the next one; unless none has ever come so far, which will not change."""
        was_there = self._mounted.is_set()
        self._stop()
        self._mounted.set()
        if was_there:
            log.warning("%s: was unmounted; once more", self._directory)
            self._mounted.clear()
            self._spawn()
        else:
            log.error("%s: cannot be mounted; groups can be had by joingroup", self._directory)

    def close(self) -> None:
        """Unmount."""
        self._stop()

    def _stop(self) -> None:
        if self._socket is None or self._process is None:
            return
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        # If it waits for an answer, it does so no longer.
        self._socket.close()
        self._socket = None
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            syscalls.umount(self._directory, syscalls.MNT_DETACH)
