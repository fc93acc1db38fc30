"""A regular file of home as a guest's stdin: its offset at home is where the guest has read to."""

from __future__ import annotations

import os

from agent.endpoints import CHUNK, End, OnEnd
from agent.reactor import Reactor
from agent.wire import Sender, nothing


class FileSource:
    """Regular file or block device → stream.

    The offset of the description, which a user's shell may share, only follows what the guest has
    read: `(migrate head -1; cat) <file` behaves as with a pipe that nobody reads ahead.

    :param fd: owned from now on; what cannot be read is at its end.
    :param on_end: FINISHED when the guest has read everything, RESET when it has closed its stdin.
    """

    def __init__(self, reactor: Reactor, sender: Sender, fd: int, *, on_end: OnEnd) -> None:
        self._sender = sender
        self._fd = fd
        self._on_end = on_end
        try:
            self._base = os.lseek(fd, 0, os.SEEK_CUR) - sender.acked
        except OSError:
            self._base = 0
        self._open = True
        sender.on_ack = self._acked
        sender.on_reset = self._refused
        reactor.defer(self._refused if sender.reset else self._fill)

    def close(self) -> None:
        """Let go of it."""
        if self._open:
            self._open = False
            self._sender.on_ack = self._sender.on_reset = nothing
            os.close(self._fd)

    def _fill(self) -> None:
        while self._open and self._sender.room:
            limit = min(CHUNK, self._sender.room)
            try:
                data = os.pread(self._fd, limit, self._base + self._sender.end)
            except OSError:
                data = b""
            if not data:
                self._sender.finish()
                return
            self._sender.write(data)

    def _acked(self) -> None:
        self._settle()
        if self._sender.finished:
            self.close()
            self._on_end(End.FINISHED)
        else:
            self._fill()

    def _refused(self) -> None:
        if self._open:
            self._settle()
            self.close()
            self._on_end(End.RESET)

    def _settle(self) -> None:
        position = self._base + min(self._sender.acked, self._sender.end)
        try:
            os.lseek(self._fd, position, os.SEEK_SET)
        except OSError:
            return  # not readable in the first place
