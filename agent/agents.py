"""The guards and keepers of this host, as migd sees them: started, found again, reaped."""

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

import msgspec

from agent import own_directory
from agent.cgroups import dissolve
from agent.link import Link, Offer, Packet, connect
from agent.spawning import AGENTS, WORKERS, Birth, ForkServer, bear
from migrate import paths
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

OnPacket = Callable[["Agent", Packet], None]
OnEnd = Callable[["Agent"], None]


class Agent:
    """One guard or keeper."""

    def __init__(self, guest: str, role: str, link: Link, offer: Offer | None) -> None:
        self.guest = guest
        self.role = role
        self.link = link
        self.offer = offer
        self.pid = 0
        self.waiting: list[asyncio.Queue[Packet | None]] = []
        """who follows what it says; None: it has ended"""
        self.moving = asyncio.Lock()
        """held by whoever moves a keeper's guest on: one hop after the other"""


class Agents:
    """All of them, by role and guest. For the running loop."""

    def __init__(self, on_packet: OnPacket, on_end: OnEnd) -> None:
        self._on_packet = on_packet
        self._on_end = on_end
        self._known: dict[tuple[str, str], Agent] = {}
        self._servers = (ForkServer(AGENTS), ForkServer(WORKERS))

    def find(self, role: str, guest: str) -> Agent | None:
        """The guard or keeper of a guest, if it runs here."""
        return self._known.get((role, guest))

    def all(self) -> list[Agent]:
        """Every one."""
        return list(self._known.values())

    def start(self, role: str, guest: str, offer: Offer | None, *words: str) -> Agent:
        """Start one; it outlives migd, so it gets a session of its own."""
        process: subprocess.Popen[bytes] | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            born = bear(Birth(role, (guest, *words)), theirs)
            if born is None:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-m", f"agent.{role}", guest, *words],
                    stdin=theirs.fileno(),
                    stdout=2,
                    cwd="/",
                    start_new_session=True,
                )
                born = process.pid, os.pidfd_open(process.pid)
        self.warm_up()
        agent = self._add(guest, role, Link(ours), offer)
        agent.pid, pidfd = born

        def ended() -> None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
            if process is not None:
                process.wait()
            self._gone(agent)

        asyncio.get_running_loop().add_reader(pidfd, ended)
        return agent

    def dismiss(self, agent: Agent) -> None:
        """End one that has got no order, by hanging up."""
        self._hang_up(agent)

    def warm_up(self) -> None:
        """There will be something to do: have the servers that fork agents and workers run."""
        for server in self._servers:
            server.need()

    def find_again(self) -> None:
        """After a restart of migd: connect with those that run."""
        paths.GUESTS_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in sorted(paths.GUESTS_DIR.iterdir()):
            role, _, guest = directory.name.partition("-")
            try:
                link = connect(directory / f"{role}.sock")
            except OSError:
                log.warning("%s: left behind, cleaned up", directory.name)
                clean_up(role, guest)
                continue
            offer = _read_offer(directory) if role == "keeper" else None
            self._add(guest, role, link, offer)

    def _add(self, guest: str, role: str, link: Link, offer: Offer | None) -> Agent:
        agent = Agent(guest, role, link, offer)
        self._known[role, guest] = agent
        link.socket.setblocking(False)
        asyncio.get_running_loop().add_reader(link.fileno(), self._readable, agent)
        return agent

    def _readable(self, agent: Agent) -> None:
        try:
            received = agent.link.receive()
        except BlockingIOError:
            return
        if received is None:
            self._hang_up(agent)
            if not agent.pid:
                self._gone(agent)
            return
        packet, fds = received
        for fd in fds:
            os.close(fd)
        for queue in agent.waiting:
            queue.put_nowait(packet)
        self._on_packet(agent, packet)

    def _hang_up(self, agent: Agent) -> None:
        if agent.link.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(agent.link.fileno())
            agent.link.close()

    def _gone(self, agent: Agent) -> None:
        self._hang_up(agent)
        if self._known.get((agent.role, agent.guest)) is agent:
            del self._known[agent.role, agent.guest]
        self._on_end(agent)

    def close(self) -> None:
        """Hang up; they run on."""
        for server in self._servers:
            server.close()
        for agent in self.all():
            self._hang_up(agent)


def _read_offer(directory: Path) -> Offer | None:
    with contextlib.suppress(OSError, *MALFORMED):
        return msgspec.msgpack.decode((directory / "offer").read_bytes(), type=Offer)
    return None


def clean_up(role: str, guest: str) -> None:
    """Give back what a guard or keeper that was killed has left."""
    dissolve(role, guest)
    own_directory.remove(paths.GUESTS_DIR / f"{role}-{guest}")
    if role == "guard":
        (paths.RUN_DIR / "deputies" / guest).unlink(missing_ok=True)
