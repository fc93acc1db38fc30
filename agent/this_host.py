"""What every part of migd works with: this host's settings, journal, agents, and ways to ask its peers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

from agent import peer_messages
from agent.agents import Agent, Agents, OnEnd, OnPacket
from agent.group_book import GroupBook
from agent.journal import Entry, Journal
from agent.link import EndGuest
from agent.load_host import count_guests
from agent.load_report import Guests
from agent.load_service import EvictGuests, LoadService
from agent.peers import Peers
from criu_hooks.proc import boot_id
from migrate import paths
from migrate.config import Config, Host, load_config
from migrate.errors import HostError, MigrateError, PeerError
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

OFFER_SECONDS = 20.0
"""how long a peer may think about any question that freezes nothing"""
RETRY_SECONDS = 1.0

Expected = TypeVar("Expected", bound=peer_messages.Answer)


class ThisHost:
    """For the running loop, until `close`."""

    def __init__(
        self,
        config: Config,
        peers: Peers,
        criu_version: str,
        on_packet: OnPacket,
        on_end: OnEnd,
        evict: EvictGuests,
    ) -> None:
        """
        :param on_packet: gets what a guard or keeper says.
        :param on_end: gets each that has ended.
        """
        self.config = config
        self.peers = peers
        self.criu_version = criu_version
        self.journal = Journal()
        self.boot_id = boot_id()
        self.book = GroupBook(paths.GROUP_BOOK)
        self.agents = Agents(on_packet, on_end)
        self.load = LoadService(
            lambda: self.config,
            peers,
            self.load_guests,
            evict,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """End all tasks; agents run on."""
        for task in self._tasks:
            task.cancel()
        self.load.close()
        self.agents.close()
        self.journal.close()

    def reload(self) -> None:
        """Read the configuration again (SIGHUP); a wrong one is told and changes nothing."""
        try:
            self.config = load_config()
        except MigrateError as error:
            log.error("configuration not reloaded: %s", error)
        else:
            log.info("configuration reloaded, %d hosts", len(self.config.hosts))
            self.load.configure()

    @property
    def name(self) -> str:
        """This host's, in the cluster."""
        return self.config.name

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Work that nobody waits for; its failure is logged."""

        async def run() -> None:
            try:
                await work
            except MigrateError as error:
                log.warning("%s", error)
            except Exception:
                log.exception("a task failed")

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def ask(
        self,
        host: Host | str,
        question: peer_messages.Question,
        expected: type[Expected],
        seconds: float = OFFER_SECONDS,
    ) -> Expected:
        """Ask another host's migd.

        :param host: it, or its name.
        :raises AnswerLost: it may or may not have acted.
        :raises MigrateError: no host of that name, no connection, or what the peer answers instead.
        """
        known = self.config.host_named(host) if isinstance(host, str) else host
        data = await self.peers.control(known).request(peer_messages.encode(question), seconds)
        try:
            answer = peer_messages.decode_answer(data)
        except MALFORMED as error:
            reason = f"its answer makes no sense ({error})"
            raise PeerError(f"host {known.name}", reason, "use the same version") from None
        if not isinstance(answer, expected):
            raise PeerError(
                f"host {known.name}", "it answers with something else", "use the same version"
            )
        return answer

    def keeper_of(self, guest: str, home: str) -> Agent | None:
        """The keeper of a guest that runs here, if `home` is that guest's home: else nobody's business."""
        keeper = self.agents.find("keeper", guest)
        mine = keeper is not None and keeper.offer is not None and keeper.offer.home == home
        return keeper if mine else None

    def load_guests(self) -> Guests:
        """The guests of other hosts that run here, or are about to."""
        offers = [agent.offer for agent in self.agents.all() if agent.role == "keeper"]
        return count_guests(
            [
                (offer.owner.uid, offer.owner.name, offer.home, offer.priority)
                for offer in offers
                if offer is not None and offer.home != self.name
            ]
        )

    def end_guest(self, guest: str, reason: str) -> None:
        """Kill a guest that runs here."""
        keeper = self.agents.find("keeper", guest)
        if keeper is not None:
            keeper.link.send(EndGuest(reason))


def in_doubt(entry: Entry) -> HostError:
    """The error for what stands frozen until it is known whether it runs elsewhere."""
    reason = f"its move to {entry.peer} is in doubt"
    return HostError(f"pid {entry.pid}", reason, "see `migctl recover`")


def guest_gone(guest: str) -> HostError:
    """The error for a guest that is looked for here in vain."""
    return HostError(f"guest {guest}", "is not here any more", "look with `migctl ps`")
