"""A terminal's mode, its size, and the input that waits in it. Works on any descriptor of a terminal.

Input that waits is what the line discipline made of the keys: after echo, erase and CR-to-NL. So
where it is put again (TIOCSTI, ioctl_tty(2): needs CAP_SYS_ADMIN) nothing of that may happen once
more; only line ends count. In a canonical mode the end of file (^D) waits as a NUL byte.

The caller must not be stopped by job control: it is in no session of that terminal, or ignores
SIGTTOU; and it must not read as a background process of the terminal's session (EIO).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from typing import Annotated

import msgspec

Flags = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Cells = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Waiting = Annotated[bytes, msgspec.Meta(max_length=1 << 17)]
"""Input that waits: a line discipline holds 4 KiB, the pty before it 64 KiB."""

_SIZE = struct.Struct("HHHH")
_CHARACTERS = 32
_CHUNK = 4096


class Size(msgspec.Struct, frozen=True, array_like=True):
    """struct winsize of ioctl_tty(2)."""

    rows: Cells
    columns: Cells
    x_pixels: Cells = 0
    y_pixels: Cells = 0

    @classmethod
    def of(cls, fd: int) -> Size:
        """:raises OSError: the terminal was hung up."""
        return cls(*_SIZE.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_SIZE.size))))

    def apply(self, fd: int) -> None:
        """The foreground group gets SIGWINCH if that changes anything."""
        data = _SIZE.pack(self.rows, self.columns, self.x_pixels, self.y_pixels)
        fcntl.ioctl(fd, termios.TIOCSWINSZ, data)


class Mode(msgspec.Struct, frozen=True, array_like=True):
    """struct termios of termios(3), but for the speeds, which pseudo-terminals ignore."""

    iflag: Flags
    oflag: Flags
    cflag: Flags
    lflag: Flags
    characters: Annotated[bytes, msgspec.Meta(max_length=_CHARACTERS)]

    @classmethod
    def of(cls, fd: int) -> Mode:
        """:raises termios.error: the terminal was hung up."""
        iflag, oflag, cflag, lflag, _, _, characters = termios.tcgetattr(fd)
        packed = b"".join(bytes((c,)) if isinstance(c, int) else c for c in characters)
        return cls(iflag, oflag, cflag, lflag, packed)

    def apply(self, fd: int) -> None:
        """At once; what waits in the terminal stays there.

        :raises termios.error: the terminal was hung up.
        """
        *_, ispeed, ospeed, there = termios.tcgetattr(fd)
        ours = [self.characters[i : i + 1] for i in range(len(self.characters))][: len(there)]
        characters = [*ours, *there[len(ours) :]]
        flags = [self.iflag, self.oflag, self.cflag, self.lflag]
        termios.tcsetattr(fd, termios.TCSANOW, [*flags, ispeed, ospeed, characters])

    @property
    def canonical(self) -> bool:
        """Input comes by lines."""
        return bool(self.lflag & termios.ICANON)

    @property
    def adds_returns(self) -> bool:
        """A carriage return goes out before each newline."""
        return bool(self.oflag & termios.OPOST and self.oflag & termios.ONLCR)

    def raw(self, *, shared: bool) -> Mode:
        """What a terminal is in while it only relays: every key is a byte, nothing is echoed.

        :param shared: others in the foreground write to it and want its signals: so it goes on
            with its output processing and its keys for signals.
        """
        lflag = self.lflag & ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        characters = bytearray(self.characters)
        characters[termios.VMIN], characters[termios.VTIME] = 1, 0
        return Mode(
            iflag=0,
            oflag=self.oflag if shared else self.oflag & ~termios.OPOST,
            cflag=self.cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8,
            lflag=lflag if shared else lflag & ~termios.ISIG,
            characters=bytes(characters),
        )

    def _quiet(self, end_of_file: int) -> Mode:
        characters = bytearray(len(self.characters))
        characters[termios.VEOF] = end_of_file
        characters[termios.VMIN] = 1
        lflag = self.lflag & termios.ICANON
        return Mode(0, self.oflag, self.cflag, lflag, bytes(characters))


def open_again(fd: int) -> int:
    """A description of our own of the terminal behind `fd`, which never blocks.

    :raises OSError: the terminal was hung up.
    """
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    return os.open(f"/proc/self/fd/{fd}", flags)


def take_waiting(fd: int) -> bytes:
    """Remove and return all input that waits, whole lines and the last, unfinished one.

    :param fd: a description that does not block.
    :raises OSError, termios.error: the terminal was hung up.
    """
    with _mode(fd) as before:
        if not before.canonical:
            return read_all(fd)
        # Line by line first: that also has the kernel deal with what has only just been typed.
        found = b"".join(_lines(fd))
        msgspec.structs.replace(before, lflag=before.lflag & ~termios.ICANON).apply(fd)
        return found + read_all(fd)


def _lines(fd: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        while True:
            line = os.read(fd, _CHUNK)
            yield line if line.endswith(b"\n") else line + b"\0"


def read_all(fd: int) -> bytes:
    """What can be read now, without waiting."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, _CHUNK):
            found += data
    return found


def put_waiting(fd: int, data: bytes) -> None:
    """Let this wait as input, as `take_waiting` found it (here or in another terminal).

    :raises OSError, termios.error: the terminal was hung up, or the kernel allows no TIOCSTI.
    """
    if not data:
        return
    end_of_file = next(byte for byte in range(1, 256) if byte not in data[-_CHUNK:] and byte != 10)
    with _mode(fd) as before:
        before._quiet(end_of_file).apply(fd)
        if before.canonical:
            data = data.replace(b"\0", bytes((end_of_file,)))
        type_keys(fd, data)


def type_keys(fd: int, data: bytes) -> None:
    """As if the user had typed this now.

    :raises OSError: the terminal was hung up, or the kernel allows no TIOCSTI.
    """
    for i in range(len(data)):
        fcntl.ioctl(fd, termios.TIOCSTI, data[i : i + 1])


@contextlib.contextmanager
def _mode(fd: int) -> Iterator[Mode]:
    before = Mode.of(fd)
    try:
        yield before
    finally:
        before.apply(fd)
