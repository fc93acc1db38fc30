"""Memory sent ahead, while the tree still runs; the dump then carries only pages that have changed since.

What was sent becomes the parent of the images (CRIU's incremental dumps, «Memory changes tracking» in its
wiki): a page of the dump that is still the same becomes an entry that refers to the parent. CRIU itself
would find out which these are by the kernel's soft-dirty bits, which many kernels lack; here each page is
compared with what was sent: with a copy of it as long as that is little, else with its digest.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from criu_hooks.pages import (
    ADD_F,
    CLOSE,
    OPEN2,
    PAGE_SIZE,
    PRESENT,
    TYPE_PID,
    Header,
    Scanner,
)

COPIES_BYTES = 16 << 20
"""So much may be kept to compare with."""
DIGEST_BYTES = 16
CHUNK_PAGES = 256
BLOCK_BYTES = 16 * PAGE_SIZE
"""Pages are compared so many at once; those of a block that has changed, one by one."""
IN_PARENT = 1
"""PE_PARENT (criu/include/pagemap.h): the page is that of the parent's images"""

# linux/fs.h, PAGEMAP_SCAN (Linux 6.7): ranges of pages by what they are.
_PAGEMAP_SCAN = 0xC0606610
_IS_FILE, _IS_PRESENT, _IS_ZERO = 1 << 2, 1 << 3, 1 << 5
_ADDRESS_SPACE = (1 << 47) - PAGE_SIZE
_RANGES = 512


class _ScanArguments(ctypes.Structure):
    """struct pm_scan_arg."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    )
    walk_end: int


def _private_ranges(pagemap_fd: int) -> Iterator[tuple[int, int]]:
    """First and last address (exclusive) of pages in memory that belong to no file.

    Nothing where the kernel cannot tell.
    """
    vector = (ctypes.c_uint64 * 3 * _RANGES)()
    start = 0
    while start < _ADDRESS_SPACE:
        arguments = _ScanArguments(
            size=ctypes.sizeof(_ScanArguments),
            start=start,
            end=_ADDRESS_SPACE,
            vec=ctypes.addressof(vector),
            vec_len=_RANGES,
            category_inverted=_IS_FILE | _IS_ZERO,
            category_mask=_IS_PRESENT | _IS_FILE | _IS_ZERO,
            return_mask=_IS_PRESENT,
        )
        try:
            count = fcntl.ioctl(pagemap_fd, _PAGEMAP_SCAN, arguments)
        except OSError:
            return
        for first, end, _ in vector[:count]:
            yield first, end
        if arguments.walk_end <= start:
            return
        start = arguments.walk_end


@dataclass
class _Runs:
    """What is known of one image, by address."""

    starts: list[int] = field(default_factory=list)
    marks: list[bytes] = field(default_factory=list)
    """the pages themselves, or a digest of each"""
    blocks: list[bytes] = field(default_factory=list)
    """with digests: one of each whole block besides"""


class KnownPages:
    """What was sent ahead, as far as it takes to recognise it."""

    def __init__(self) -> None:
        self._runs: dict[int, _Runs] = {}
        self._copies_left = COPIES_BYTES
        self._copying = True

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, destination: int, address: int, data: bytes) -> None:
        """Remember whole pages. In the order of their addresses for each destination."""
        runs = self._runs.setdefault(destination, _Runs())
        if self._copying:
            self._copies_left -= len(data)
            if self._copies_left < 0:
                self._digest_all()
        runs.starts.append(address)
        if self._copying:
            runs.marks.append(data)
        else:
            runs.marks.append(_digests(data, PAGE_SIZE))
            runs.blocks.append(_digests(data, BLOCK_BYTES))

    def same_block(self, destination: int, address: int, block: memoryview) -> bool:
        """Whether this block was sent ahead just as it is now. False as well if it lies otherwise."""
        runs = self._runs.get(destination)
        if runs is None:
            return False
        at = bisect.bisect_right(runs.starts, address) - 1
        if at < 0:
            return False
        offset = address - runs.starts[at]
        if self._copying:
            return memoryview(runs.marks[at])[offset : offset + BLOCK_BYTES] == block
        number, rest = divmod(offset, BLOCK_BYTES)
        if rest:
            return False
        mark = runs.blocks[at][number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        return mark == _digest(block)

    def same(self, destination: int, address: int, page: bytes) -> bool:
        """Whether this page was sent ahead just as it is now."""
        runs = self._runs.get(destination)
        if runs is None:
            return False
        at = bisect.bisect_right(runs.starts, address) - 1
        if at < 0:
            return False
        marks = runs.marks[at]
        number = (address - runs.starts[at]) // PAGE_SIZE
        size = PAGE_SIZE if self._copying else DIGEST_BYTES
        mark = marks[number * size : (number + 1) * size]
        return mark == (page if self._copying else _digest(page))

    def _digest_all(self) -> None:
        self._copying = False
        for runs in self._runs.values():
            runs.blocks = [_digests(data, BLOCK_BYTES) for data in runs.marks]
            runs.marks = [_digests(data, PAGE_SIZE) for data in runs.marks]


def _digest(page: bytes | memoryview) -> bytes:
    return hashlib.sha256(page).digest()[:DIGEST_BYTES]


def _digests(data: bytes, size: int) -> bytes:
    """One of each whole piece of that size."""
    view, whole = memoryview(data), len(data) // size * size
    return b"".join(_digest(view[at : at + size]) for at in range(0, whole, size))


def send_ahead(proc_fd: int, cgroup_pids: Iterable[int], known: KnownPages) -> Iterator[bytes]:
    """The private memory of running processes as a page stream, for the parent of the images.

    :param proc_fd: of a /proc in which the pids are as criu will count.
    :param cgroup_pids: the tree's.
    :param known: gets what is sent.
    """
    for pid in sorted(cgroup_pids):
        with ExitStack() as stack:
            try:
                mem, pagemap = (
                    _open(stack, f"{pid}/{name}", proc_fd) for name in ("mem", "pagemap")
                )
            except OSError:
                continue  # it has just ended
            yield from _send_process(pid, mem, pagemap, known)
    yield Header(CLOSE, 0, 0, 0, 0).encode()


def _open(stack: ExitStack, name: str, proc_fd: int) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
    stack.callback(os.close, fd)
    return fd


def _send_process(pid: int, mem: int, pagemap: int, known: KnownPages) -> Iterator[bytes]:
    destination = pid << 8 | TYPE_PID
    opened = False
    for first, end in _private_ranges(pagemap):
        for address in range(first, end, CHUNK_PAGES * PAGE_SIZE):
            try:
                data = os.pread(mem, min(end - address, CHUNK_PAGES * PAGE_SIZE), address)
            except OSError:
                continue  # unmapped meanwhile, or not to be read
            data = data[: len(data) // PAGE_SIZE * PAGE_SIZE]
            if not data:
                continue
            if not opened:
                opened = True
                yield Header(OPEN2, 0, 0, 0, destination).encode()
            known.add(destination, address, data)
            header = Header(ADD_F, PRESENT, len(data) // PAGE_SIZE, address, destination)
            yield header.encode()
            yield data


class Thinner:
    """Takes the page stream of a dump, and leaves out the pages that are known."""

    def __init__(self, known: KnownPages) -> None:
        self._known = known
        self._scanner = Scanner()
        self._destination = 0
        self._address = 0
        self._partial = b""
        self._out = bytearray()
        self._run_same = False
        self._run_address = 0
        self._run_pages = 0
        self._run_data: list[bytes] = []

    def feed(self, view: memoryview) -> bytearray:
        """What is to be sent for this piece of the stream. A page is kept until it is whole."""
        self._out = bytearray()
        for header, payload in self._scanner.feed(view):
            if header is None:
                self._pages(payload)
                continue
            self._flush()
            if header.payload_bytes:
                self._destination, self._address = header.destination, header.address
            else:
                self._out += header.encode()
        self._flush()
        return self._out

    def _pages(self, payload: memoryview) -> None:
        at = 0
        if self._partial:
            at = min(PAGE_SIZE - len(self._partial), len(payload))
            self._partial += payload[:at]
            if len(self._partial) < PAGE_SIZE:
                return
            page, self._partial = self._partial, b""
            self._page(page)
        whole = at + (len(payload) - at) // PAGE_SIZE * PAGE_SIZE
        while at < whole:
            block = payload[at : at + BLOCK_BYTES]
            if at + BLOCK_BYTES <= whole and self._known.same_block(
                self._destination, self._address, block
            ):
                self._same_block()
                at += BLOCK_BYTES
            else:
                self._page(bytes(payload[at : at + PAGE_SIZE]))
                at += PAGE_SIZE
        self._partial = bytes(payload[whole:])

    def _same_block(self) -> None:
        if self._run_pages and not self._run_same:
            self._flush()
        if not self._run_pages:
            self._run_same, self._run_address = True, self._address
        self._run_pages += BLOCK_BYTES // PAGE_SIZE
        self._address += BLOCK_BYTES

    def _page(self, page: bytes) -> None:
        same = self._known.same(self._destination, self._address, page)
        if self._run_pages and same is not self._run_same:
            self._flush()
        if not self._run_pages:
            self._run_same, self._run_address = same, self._address
        self._run_pages += 1
        self._address += PAGE_SIZE
        if not same:
            self._run_data.append(page)

    def _flush(self) -> None:
        if self._run_pages:
            flags = IN_PARENT if self._run_same else PRESENT
            header = Header(ADD_F, flags, self._run_pages, self._run_address, self._destination)
            self._out += header.encode()
            self._out += b"".join(self._run_data)
            self._run_data.clear()
            self._run_pages = 0
