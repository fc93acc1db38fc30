"""While CRIU dumps: its pages go out on the bulk connection, its notifications are answered."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterable

from agent.bulk import Bulk
from agent.faults import reach
from agent.reactor import Reactor
from criu_hooks.calls import CriuCall, Done
from criu_hooks.pages import PageSource
from criu_hooks.precopy import KnownPages, Thinner, send_ahead
from migrate.errors import CriuError

BUFFER_BYTES = 1 << 20
SOCKET_BYTES = 4 << 20
REPORT_SECONDS = 0.1
TURN_MS = 100
"""Longest time between two turns of the reactor, for its timers."""
SO_RCVBUFFORCE = 33
SO_SNDBUFFORCE = 32


def page_sockets() -> tuple[socket.socket, socket.socket]:
    """Ours and criu's end of its page server connection, with room for more than a few pages."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            with contextlib.suppress(OSError):  # without CAP_NET_ADMIN the default must do
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    return ours, theirs


def pump_ahead(
    reactor: Reactor, bulk: Bulk, proc_fd: int, pids: Iterable[int], report: Callable[[], None]
) -> KnownPages:
    """Send the memory of a tree that runs; what changes meanwhile is sent again by `pump_pages`.

    :param proc_fd: of a /proc in which the pids are as criu will count.
    :returns: what the destination then has.
    """
    known = KnownPages()
    reported = time.monotonic()
    for piece in send_ahead(proc_fd, pids, known):
        bulk.send_pages(memoryview(piece))
        reactor.turn(0)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            report()
    return known


def pump_pages(
    reactor: Reactor,
    call: CriuCall,
    pages: socket.socket,
    bulk: Bulk,
    known: KnownPages,
    patience_seconds: float,
    report: Callable[[], None],
) -> None:
    """Until CRIU has dumped the tree and left it to the freezer.

    The reactor goes on meanwhile: the tree's own files may be served by it.

    :param known: what the destination has already.
    :param report: is called now and then.
    :raises CriuError: the dump failed, or made no progress for so long.
    :raises PeerError: the destination is cut off.
    """
    source = PageSource()
    thinner = Thinner(known)
    buffer = bytearray(BUFFER_BYTES)
    view = memoryview(buffer)
    poll = select.poll()
    for fd in (pages.fileno(), call.fileno(), reactor.fileno()):
        poll.register(fd, select.POLLIN)
    now = reported = time.monotonic()
    deadline = now + patience_seconds
    while True:
        ready = {fd for fd, _ in poll.poll(TURN_MS)}
        now = time.monotonic()
        if now > deadline:
            raise CriuError("criu", f"made no progress for {patience_seconds:g} seconds")
        if pages.fileno() in ready:
            count = pages.recv_into(buffer)
            if count:
                if reply := source.answers(view[:count]):
                    pages.send(reply)
                piece = memoryview(thinner.feed(view[:count])) if known else view[:count]
                if piece:
                    bulk.send_pages(piece)
                deadline = time.monotonic() + patience_seconds
                if now - reported > REPORT_SECONDS:
                    reported = now
                    report()
            else:
                poll.unregister(pages.fileno())
        elif call.fileno() in ready:
            event = call.receive(1)
            if isinstance(event, Done):
                if not event.ok:
                    raise CriuError("criu", event.reason)
                if not source.finished:
                    raise CriuError("criu", "the dump ended early")
                return
            reach("source-criu")
            call.proceed()
        if reactor.fileno() in ready or not ready:
            reactor.turn(0)
