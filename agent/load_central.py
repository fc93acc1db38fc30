"""The central daemon: answers for the cluster while this migd leads. A part of migd, not a process.

Members are known by their keys (`host` is always what the connection has proved). That a client is
who its member says, the central daemon takes from it: a host vouches for its users.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.load_book import LoadBook
from agent.load_checkpoint import Checkpoint, Contents
from agent.load_database import KnownHost, Session
from agent.load_messages import (
    LISTEN_SECONDS,
    Attached,
    AttachHost,
    ClientHolds,
    EvictHere,
    ForClient,
    News,
)
from agent.load_report import Report
from migrate import mig_messages as mig
from migrate.config import Config
from migrate.errors import MigrateError, PeerError, UserError

log = logging.getLogger("migrate.central")

TICK_SECONDS = 1.0
RECLAIM_SECONDS = 10.0
"""A member whose connection is gone has so long to come back before its clients lose their claims."""
BACKLOG = 8192
"""News kept for a member that does not listen."""

Item = ForClient | EvictHere


@dataclass(eq=False, slots=True)
class _Member:
    news: deque[Item] = field(default_factory=lambda: deque[Item](maxlen=BACKLOG))
    listening: asyncio.Future[None] | None = None
    gone_at: float | None = None
    """when its connection ended, by the steady clock"""


class Central:
    """The load database with its clients, from `start` to `close`, in the running loop."""

    def __init__(
        self,
        config: Config,
        term: int,
        here: Callable[[Item], None],
        checkpoint: Path,
    ) -> None:
        """:param here: takes what is for this host itself."""
        self.term = term
        self._name = config.name
        self._here = here
        self._members: dict[str, _Member] = {}
        self._book = LoadBook(
            self._tell,
            self._evict,
            down_seconds=config.down_seconds,
            give_back_seconds=config.give_back_seconds,
        )
        self._ids: dict[int, str] = {}
        self.configure(config)
        self._checkpoint = Checkpoint(checkpoint, self._contents)
        self._since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._complaints: set[tuple[str, str]] = set()

    def start(self, known: Iterable[KnownHost]) -> None:
        """:param known: what the checkpoint file says; hosts that are configured no more are left out."""
        known = tuple(known)
        now = time.time()
        for host in known:
            if host.name in self._ids.values():
                number = next(i for i, name in self._ids.items() if name == host.name)
                self._book.add_host(host.name, number, min(max(0.0, host.last_up), now))
        self._checkpoint.start(known)
        self._checkpoint.changed()
        self._tick()
        log.info("%s is the central daemon now (term %d)", self._name, self.term)

    def close(self) -> None:
        """Step down: those who listen are told so."""
        if self._timer is not None:
            self._timer.cancel()
        self._checkpoint.close()
        for member in self._members.values():
            if member.listening is not None and not member.listening.done():
                member.listening.cancel()
        log.info("%s is the central daemon no longer (term %d)", self._name, self.term)

    def configure(self, config: Config) -> None:
        """Take over the hosts of the configuration."""
        self._ids = {host.id: host.name for host in config.hosts}
        for host in config.hosts:
            self._book.add_host(host.name, host.id)

    # ------------------------------------------------------------------ members

    def attach(self, host: str, asked: AttachHost) -> Attached:
        """A host follows us: its report, and what its clients hold."""
        member = self._members.setdefault(host, _Member())
        member.gone_at = None
        member.news.clear()
        self.report(host, asked.report)
        now = time.monotonic()
        for session in self._book.sessions(host):
            self._book.close(session, now, with_agents=True)
        lost = []
        for client in asked.clients:
            session = Session(host, client.number)
            self._book.open(session, client.uid)
            if missing := self._book.reclaim(session, client.held, now):
                lost.append(ClientHolds(client.number, client.uid, tuple(missing)))
        return Attached(self.term, tuple(lost))

    def knows(self, host: str) -> bool:
        """Whether it has attached itself."""
        return host in self._members

    def report(self, host: str, report: Report) -> None:
        """:raises PeerError: it makes no sense; that is logged once."""
        try:
            self._book.report(host, report, time.monotonic(), time.time())
        except PeerError as error:
            if (host, error.reason) not in self._complaints:
                self._complaints.add((host, error.reason))
                log.warning("%s", error)
            raise
        self._checkpoint.changed()

    async def listen(self, host: str) -> News | None:
        """What there is to tell a member; waits for it. None: we lead no longer."""
        member = self._members[host]
        self._book.heard(host, time.monotonic())
        member.gone_at = None
        if member.listening is not None and not member.listening.done():
            member.listening.set_result(None)
        if not member.news:
            member.listening = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(LISTEN_SECONDS):
                    await member.listening
            except TimeoutError:
                pass
            except asyncio.CancelledError:
                if not member.listening.cancelled():
                    raise
                return None
        items = tuple(member.news)
        member.news.clear()
        return News(items)

    def member_gone(self, host: str) -> None:
        """Its connection has ended; its clients may come back with it."""
        member = self._members.get(host)
        if member is not None:
            member.gone_at = time.monotonic()
            self._book.absent(host)

    # ------------------------------------------------------------------ clients

    def call(self, session: Session, uid: int, request: mig.Request) -> mig.Reply:
        """What a client asks. Never raises MigrateError: a failure is a reply."""
        try:
            return self._answer(session, uid, request)
        except MigrateError as error:
            return failure(error)

    def _answer(self, session: Session, uid: int, request: mig.Request) -> mig.Reply:
        now = time.monotonic()
        book = self._book
        match request:
            case mig.RequestHosts():
                book.open(session, uid)
                return mig.Granted(book.request(session, request, now))
            case mig.ReturnHosts(hosts, all_of_them):
                book.open(session, uid)
                return mig.Done(book.give_back(session, None if all_of_them else hosts, now))
            case mig.Confirm(host):
                book.open(session, uid)
                return mig.Confirmed(book.confirm(session, host))
            case mig.Open(_, held):
                book.open(session, uid)
                return mig.Opened(session.host, tuple(book.reclaim(session, held, now)))
            case mig.AskHost(name, number):
                return mig.HostIs(book.info(name or self._name_of(number), now))
            case mig.AskAll():
                return mig.HostsAre(tuple(book.all_info(now)))
            case mig.AskStats():
                return msgspec.structs.replace(
                    book.stats(), central=self._name, term=self.term, up_seconds=now - self._since
                )
            case mig.DeleteHost(host):
                if uid != 0:
                    raise UserError(f"host {host}", "only root may delete a host")
                book.delete_host(host)
                self._members.pop(host, None)
                self._checkpoint.changed()
                return mig.Done()
            case _:
                raise UserError("request", "is for the host's own migd")

    def gone(self, session: Session) -> None:
        """A client has gone."""
        self._book.close(session, time.monotonic())

    def _name_of(self, number: int) -> str:
        try:
            return self._ids[number]
        except KeyError:
            raise UserError(f"host id {number}", "is not in the load database") from None

    # ------------------------------------------------------------------ news

    def _tell(self, session: Session, event: mig.Event) -> None:
        self._post(session.host, ForClient(session.number, event))

    def _evict(self, host: str, uid: int, reason: str) -> None:
        self._post(host, EvictHere(uid, reason))

    def _post(self, host: str, item: Item) -> None:
        if host == self._name:
            self._here(item)
            return
        member = self._members.get(host)
        if member is None:
            return
        member.news.append(item)
        if member.listening is not None and not member.listening.done():
            member.listening.set_result(None)

    # ------------------------------------------------------------------ time

    def _tick(self) -> None:
        now = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)
        self._book.tick(now)
        for host, member in self._members.items():
            if member.gone_at is not None and now - member.gone_at > RECLAIM_SECONDS:
                member.gone_at = None
                for session in self._book.sessions(host):
                    self._book.close(session, now)

    def _contents(self) -> Contents:
        return Contents(self.term, tuple(self._book.known()))


def failure(error: MigrateError) -> mig.Failure:
    """An error as a reply."""
    return mig.Failure(type(error).__name__, error.what[:256], error.reason, error.remedy)
