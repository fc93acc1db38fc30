"""The load database as the rest of migd uses it: one object that holds its parts together."""

from __future__ import annotations

import logging
import pwd
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent import load_messages as words
from agent.load_central import failure
from agent.load_host import CountGuests, LoadHost
from agent.load_member import Client, Deliver, LoadMember
from agent.peers import Peers
from migrate import mig_messages as mig
from migrate import paths
from migrate.config import Config, Host
from migrate.errors import HostError, MigrateError, PeerError, UserError

log = logging.getLogger(__name__)

EvictGuests = Callable[[int | None, str], int]
"""(uid or None for all, reason): send guests of this host home. :return: how many are told to go."""


@dataclass
class Choice:
    """A host chosen by the load database, marked in use until the block that chose it ends."""

    host: Host
    kept: bool = False

    def keep(self) -> None:
        """A guest is there now: the mark stays for as long as the guest."""
        self.kept = True


class LoadService:
    """For the running loop, from `start` to `close`."""

    def __init__(
        self,
        config: Callable[[], Config],
        peers: Peers,
        count_guests: CountGuests,
        evict: EvictGuests,
        *,
        state_dir: Path = paths.STATE_DIR,
        run_dir: Path = paths.RUN_DIR,
    ) -> None:
        self._config = config
        self._evict = evict
        self.host = LoadHost(
            config,
            count_guests,
            self._changed,
            self._owner_is_back,
            blocked_file=state_dir / paths.BLOCKED_FILE.name,
            loadavg_file=run_dir / paths.LOADAVG_FILE.name,
        )
        self.member = LoadMember(
            config,
            peers,
            self.host.report,
            self._evict,
            checkpoint=state_dir / paths.LOAD_CHECKPOINT.name,
        )
        self._started = False

    async def start(self) -> None:
        """Sample, and look for the central daemon."""
        await self.host.start()
        self._started = True
        self.member.start()

    def close(self) -> None:
        """Stop."""
        self._started = False
        self.host.close()
        self.member.close()

    def configure(self) -> None:
        """The configuration was read again."""
        self.member.configure()
        self.host.reconsider()

    def _changed(self) -> None:
        if self._started:
            self.member.report_soon()

    def _owner_is_back(self, reason: str) -> None:
        self._evict(None, reason)

    def owner_came(self, reason: str) -> int:
        """The owner has come back, or wants its host. :return: how many guests are told to go."""
        count = self._evict(None, reason)
        self.host.owner_came()
        return count

    # ------------------------------------------------------------------ migd's own choices

    @asynccontextmanager
    async def choose(
        self,
        uid: int,
        priority: mig.Priority = mig.Priority.NORMAL,
        excluded: frozenset[str] = frozenset(),
    ) -> AsyncIterator[Choice]:
        """An idle host for a guest of this user, in use until the block ends.

        If a guest is there by then, call `keep`: the host is in use for as long as it runs.

        :raises PeerError: there is none.
        """
        client = self.member.open(uid, _ignore)
        try:
            wish = mig.RequestHosts(1, priority, agent=True, exclude=tuple(sorted(excluded)))
            reply = await self.member.call(client, wish)
            if isinstance(reply, mig.Failure):
                raise PeerError(reply.what, reply.reason, reply.remedy)
            if not isinstance(reply, mig.Granted) or not reply.hosts:
                raise PeerError(
                    "cluster",
                    "no other host is idle now that takes guests"
                    if not excluded
                    else "no other host is idle now that has not refused",
                    "`rup` shows them; name one with -h, or try later",
                )
            choice = Choice(self._config().host_named(reply.hosts[0]))
            try:
                yield choice
            finally:
                if not choice.kept:
                    await self.member.call(client, mig.ReturnHosts(reply.hosts))
        finally:
            self.member.leave(client)

    # ------------------------------------------------------------------ clients

    def open(self, uid: int, deliver: Deliver) -> Client:
        """A client of load.sock has come."""
        return self.member.open(uid, deliver)

    def call(self, client: Client, request: mig.Request) -> mig.Reply | Awaitable[mig.Reply]:
        """What it asks: the reply at once if possible."""
        try:
            reply = self._own(client.uid, request)
        except MigrateError as error:
            return failure(error)
        if isinstance(request, mig.AwaitGone):
            return self._await_gone()
        if reply is None:
            reply = self.member.call_now(client, request)
        return self.member.call(client, request) if reply is None else reply

    async def _await_gone(self) -> mig.Reply:
        return mig.Done(await self.host.await_gone())

    def leave(self, client: Client) -> None:
        """It has gone."""
        self.member.leave(client)

    def _own(self, uid: int, request: mig.Request) -> mig.Reply | None:
        """What is for this host itself."""
        match request:
            case mig.Open(protocol) if protocol != mig.PROTOCOL:
                raise UserError(
                    "Mig library",
                    f"speaks protocol {protocol}, migd {mig.PROTOCOL}",
                    "restart migd and the program after an upgrade",
                )
            case mig.Open(_, ()):
                return mig.Opened(self._config().name)
            case mig.AskLocal():
                return mig.HostIs(self.host.info(0.0))
            case mig.Evict():
                self._require_owner(uid, "evict guests")
                return mig.Done(self.owner_came(f"{_name_of(uid) or uid} asked for it"))
            case mig.SetLimits():
                if uid != 0:
                    raise UserError("set", "only root may do this")
                self.host.set_limits(request)
                return mig.Done()
            case mig.Block(reason):
                self._require_owner(uid, "block it")
                self.host.block(reason or "blocked by its owner")
                return mig.Done()
            case mig.Expel(reason):
                self._require_owner(uid, "send its guests away")
                reason = reason or f"{_name_of(uid) or uid} wants it empty"
                self.host.block(reason)
                return mig.Done(self._evict(None, reason))
            case mig.Bring():
                self._require_owner(uid, "open it")
                self.host.bring()
                return mig.Done()
            case _:
                return None

    def _require_owner(self, uid: int, what: str) -> None:
        """Root, and whom the configuration names."""
        config = self._config()
        if uid == 0 or (config.owners and _name_of(uid) in config.owners):
            return
        raise UserError(
            f"host {config.name}",
            f"only root and its owners may {what}",
            "see `owners` in its configuration",
        )

    # ------------------------------------------------------------------ peers

    def answer_now(self, peer: str, question: words.LoadQuestion) -> bytes | None:
        """The answer to a peer's question; None if that takes time. Raises PeerError."""
        if not self._started:
            raise HostError(f"host {self._config().name}", "its migd is starting")
        answer = self.member.answer_now(peer, question)
        return None if answer is None else words.encode(answer)

    async def answer(self, peer: str, question: words.LoadQuestion) -> bytes:
        """As `answer_now`, whatever it is."""
        if not self._started:
            raise HostError(f"host {self._config().name}", "its migd is starting")
        return words.encode(await self.member.answer(peer, question))


def _ignore(event: mig.Event) -> None:
    """migd's own claims last for one migration; that the host is lost shows in its refusal."""


@lru_cache(maxsize=256)
def _name_of(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return ""
