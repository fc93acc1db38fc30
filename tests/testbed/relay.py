"""Copies bytes between the caller's descriptors and a command's."""

import errno
import os
import selectors

CHUNK = 65536


def write_all(fd: int, data: bytes) -> None:
    """Write every byte; waits if it must."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Relay:
    """Any number of inputs and outputs, served until a process has ended."""

    def __init__(self) -> None:
        # poll, not epoll: that one takes no regular files
        self._selector = selectors.PollSelector()
        self._outputs: dict[int, int] = {}

    def add_output(self, source: int, target: int) -> None:
        """From a command's descriptor to the caller's."""
        os.set_blocking(source, False)
        self._outputs[source] = target
        self._selector.register(
            source, selectors.EVENT_READ, lambda: self._copy_output(source) and None
        )

    def add_input(self, source: int, target: int, at_end: bytes | None = None) -> None:
        """From the caller's descriptor to a command's.

        :param at_end: what to write when the input ends; None closes the target.
        """
        os.set_blocking(target, False)
        pending = b""
        ended = False

        def read() -> None:
            nonlocal pending, ended
            pending = os.read(source, CHUNK)
            if not pending:
                ended = True
                pending = at_end or b""
            self._selector.unregister(source)
            self._selector.register(target, selectors.EVENT_WRITE, write)

        def write() -> None:
            nonlocal pending, ended
            try:
                pending = pending[os.write(target, pending) :] if pending else b""
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):  # the reader has gone
                    raise
                pending, ended = b"", True
            if pending:
                return
            self._selector.unregister(target)
            if not ended:
                self._selector.register(source, selectors.EVENT_READ, read)
            elif at_end is None:
                os.close(target)

        self._selector.register(source, selectors.EVENT_READ, read)

    def add_wakeup(self, source: int) -> None:
        """Return from waiting for a moment whenever something comes here; it is thrown away."""
        self._selector.register(
            source, selectors.EVENT_READ, lambda: os.read(source, CHUNK) and None
        )

    def run(self, pidfd: int) -> None:
        """Copy until the process has ended; then what it has left behind in its pipes."""
        ended = False

        def end() -> None:
            nonlocal ended
            ended = True

        self._selector.register(pidfd, selectors.EVENT_READ, end)
        while not ended:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():  # not dropped by one before it
                    key.data()
        for source in list(self._outputs):
            while source in self._outputs and self._copy_output(source):
                pass

    def _copy_output(self, source: int) -> bool:
        """:return: False when there is nothing to read just now, or never again."""
        try:
            data = os.read(source, CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal tells that its last user has gone
                raise
            data = b""
        if data:
            write_all(self._outputs[source], data)
            return True
        self._selector.unregister(source)
        del self._outputs[source]
        return False
