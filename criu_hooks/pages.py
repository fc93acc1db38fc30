"""The memory pages of a dump as a byte stream: from criu at the source to images at the other end.

With a page server, criu sends memory as it reads it and needs no room for it. The protocol is
CRIU's own (criu/page-xfer.c, struct page_server_iov, as of 4.2): a header {u32 command and flags,
u64 pages, u64 address, u64 destination}, followed by the pages if the PRESENT flag is set. The
source forwards the stream as it comes and answers criu's questions itself; the destination writes
the image files that criu restore expects (images/pagemap.proto). All of it is checked: the
destination must not trust the source.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_HEADER = struct.Struct("=IxxxxQQQ")
_COMMAND_MASK = 0xFFFF
OPEN2 = 4
PARENT = 5
ADD_F = 6
CLOSE = 0x1023
FORCE_CLOSE = 0x1024
PRESENT = 1 << 2
_KNOWN_FLAGS = 0b111
TYPE_PID = 1
_TYPE_SHMEM = 2

_MAGIC_COMMON = 0x54564319
_MAGIC_PAGEMAP = 0x56084025

MAX_IMAGES = 100_000
MAX_PAGEMAP_BYTES = 1 << 26
"""Of one image; kept in memory until it is whole."""
ADDRESS_SPACE = 1 << 64


class PageStreamError(Exception):
    """The page stream does not follow the protocol."""


@dataclass(frozen=True)
class Header:
    """One page_server_iov."""

    command: int
    flags: int
    pages: int
    address: int
    destination: int

    def encode(self) -> bytes:
        """As it goes over the wire."""
        words = (self.pages, self.address, self.destination)
        return _HEADER.pack(self.command | self.flags << 16, *words)

    @property
    def payload_bytes(self) -> int:
        """How many bytes of memory follow the header."""
        if self.command == ADD_F and self.flags & PRESENT:
            return self.pages * PAGE_SIZE
        return 0


def _parse(data: bytes | bytearray | memoryview) -> Header:
    command, pages, address, destination = _HEADER.unpack_from(data)
    header = Header(command & _COMMAND_MASK, command >> 16, pages, address, destination)
    if header.command not in (OPEN2, PARENT, ADD_F, CLOSE, FORCE_CLOSE):
        raise PageStreamError(f"unknown page server command {header.command:#x}")
    return header


class Scanner:
    """Finds the headers in a stream that arrives in pieces of any size."""

    def __init__(self) -> None:
        self._partial = bytearray()
        self.payload_left = 0

    def feed(self, view: memoryview) -> list[tuple[Header | None, memoryview]]:
        """Split `view` into headers and pieces of payload, in order.

        :returns: (header, empty) or (None, payload).
        """
        found: list[tuple[Header | None, memoryview]] = []
        at = 0
        while at < len(view):
            if self.payload_left:
                end = min(len(view), at + self.payload_left)
                found.append((None, view[at:end]))
                self.payload_left -= end - at
                at = end
                continue
            need = _HEADER.size - len(self._partial)
            piece = view[at : at + need]
            at += len(piece)
            if len(piece) < need or self._partial:
                self._partial += piece
                if len(self._partial) < _HEADER.size:
                    break
                header = _parse(self._partial)
                self._partial.clear()
            else:
                header = _parse(piece)
            self.payload_left = header.payload_bytes
            found.append((header, view[at:at]))
        return found


class PageSource:
    """The source's side: watches the stream of a dump go by and says what criu must be answered."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self.finished = False
        self.page_bytes = 0

    def answers(self, view: memoryview) -> bytes:
        """What to send back to criu for this piece of the stream."""
        reply = b""
        for header, payload in self._scanner.feed(view):
            self.page_bytes += len(payload)
            if header is None:
                continue
            if header.command == OPEN2:
                reply += b"\0"  # no parent image
            elif header.command == PARENT:
                reply += struct.pack("=i", 0)
            elif header.command in (CLOSE, FORCE_CLOSE):
                reply += struct.pack("=i", 0)
                self.finished = True
        return reply


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(*fields: tuple[int, int]) -> bytes:
    """A protobuf message of varint fields, with the u32 length that CRIU puts before each."""
    body = b"".join(_varint(number << 3) + _varint(value) for number, value in fields)
    return struct.pack("=I", len(body)) + body


class PageImageWriter:
    """The destination's side: writes pagemap-*.img and pages-*.img below a directory descriptor."""

    def __init__(self, directory_fd: int) -> None:
        self._directory_fd = directory_fd
        self._scanner = Scanner()
        self._images = 0
        self._pages_fd = -1
        self._pagemap = bytearray()
        self._pagemap_name = ""
        self._names: set[str] = set()
        self._destination: int | None = None
        self.finished = False
        self.page_bytes = 0

    def write(self, view: memoryview) -> None:
        """Take the next piece of the stream. Raises PageStreamError, OSError."""
        for header, payload in self._scanner.feed(view):
            if header is None:
                self.page_bytes += len(payload)
                while payload:
                    payload = payload[os.write(self._pages_fd, payload) :]
            elif self.finished:
                raise PageStreamError("pages after the end")
            elif header.command == OPEN2:
                self._open(header.destination)
            elif header.command == ADD_F:
                self._add(header)
            elif header.command in (CLOSE, FORCE_CLOSE):
                self.close()
                self.finished = True

    def close(self) -> None:
        """Finish the files that are being written."""
        if self._pages_fd >= 0:
            os.close(self._pages_fd)
            self._pages_fd = -1
            with open(self._create(self._pagemap_name), "wb") as file:
                file.write(self._pagemap)
            self._destination = None

    def _create(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._directory_fd)

    def _open(self, destination: int) -> None:
        self.close()
        kind, number = destination & 0xFF, destination >> 8
        if kind not in (TYPE_PID, _TYPE_SHMEM) or number > 0xFFFFFFFF:
            raise PageStreamError(f"unknown page destination {destination:#x}")
        name = f"pagemap-{number}.img" if kind == TYPE_PID else f"pagemap-shmem-{number}.img"
        if name in self._names or self._images >= MAX_IMAGES:
            raise PageStreamError(f"{name} comes twice")
        self._names.add(name)
        self._images += 1
        self._pagemap_name = name
        self._pagemap = bytearray(struct.pack("=II", _MAGIC_COMMON, _MAGIC_PAGEMAP))
        self._pagemap += _message((1, self._images))
        self._pages_fd = self._create(f"pages-{self._images}.img")
        self._destination = destination

    def _add(self, header: Header) -> None:
        if header.destination != self._destination:
            raise PageStreamError("pages for an image that is not open")
        if header.flags & ~_KNOWN_FLAGS or not 0 < header.pages < 1 << 40:
            raise PageStreamError("unknown page flags")
        if header.address % PAGE_SIZE or header.address + header.pages * PAGE_SIZE > ADDRESS_SPACE:
            raise PageStreamError(f"no pages can be at {header.address:#x}")
        if len(self._pagemap) > MAX_PAGEMAP_BYTES:
            raise PageStreamError(f"{self._pagemap_name} is too large")
        self._pagemap += _message(
            (1, header.address),
            (2, header.pages & 0xFFFFFFFF),
            (4, header.flags),
            (5, header.pages),
        )
