"""The links of a guard or keeper with the migds of its host: one after the other, as they are restarted."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from agent.link import Link, Packet
from agent.reactor import READ, Reactor

OnPacket = Callable[[Link, Packet, list[int]], None]


class Links:
    """All that are open. What is said goes to each."""

    def __init__(self, reactor: Reactor, on_packet: OnPacket) -> None:
        """:param on_packet: gets each packet, and owns the descriptors that came with it."""
        self._reactor = reactor
        self._on_packet = on_packet
        self._open: list[Link] = []

    def add(self, link: Link) -> None:
        """Listen to it until its other end closes it."""
        self._open.append(link)
        self._reactor.register(link.fileno(), READ, lambda _: self._readable(link))

    def accept(self, server: socket.socket) -> Link | None:
        """Take in a migd that knocks; None if it is gone already."""
        with contextlib.suppress(OSError):
            sock, _ = server.accept()
            link = Link(sock)
            self.add(link)
            return link
        return None

    def say(self, packet: Packet) -> None:
        """Tell every migd that listens."""
        for link in self._open:
            link.send(packet)

    def _readable(self, link: Link) -> None:
        received = link.receive()
        if received is None:
            self._reactor.unregister(link.fileno())
            self._open.remove(link)
            link.close()
            return
        packet, fds = received
        self._on_packet(link, packet, fds)
