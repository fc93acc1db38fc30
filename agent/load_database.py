"""The interface of the load database: what is known of every host, and who may use which.

agent/load_book.py keeps it in memory; an existing distributed store could stand behind it as well.
Nothing here does I/O or looks at a clock: times are given, in seconds of any steady clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from agent.load_report import Report
from migrate.mig_messages import Event, Held, HostInfo, RequestHosts, Stats


class Session(NamedTuple):
    """A client: the host it is on, and a number that its migd gave it."""

    host: str
    number: int


class KnownHost(NamedTuple):
    """What outlives a central daemon."""

    name: str
    last_up: float
    """seconds since the epoch; 0: never heard of"""


Tell = Callable[[Session, Event], None]
"""Delivers an event to a client."""
EvictUser = Callable[[str, int, str], None]
"""(host, uid, reason): this user's guests are to leave this host."""


class LoadDatabase(Protocol):
    """Hosts report, clients claim. `now` is the caller's steady clock, in seconds."""

    def add_host(self, name: str, host_id: int, last_up: float = 0.0) -> None:
        """Make a host known; it is down until it reports. Its number may be changed so."""

    def report(self, host: str, report: Report, now: float) -> None:
        """A host's word. :raises PeerError: it makes no sense; nothing is changed."""

    def heard(self, host: str, now: float) -> None:
        """A sign of life."""

    def absent(self, host: str) -> None:
        """Its connection has ended: it is not chosen until there is a sign of life."""

    def delete_host(self, host: str) -> None:
        """Forget a host. :raises UserError: there is none, or it is not down."""

    def info(self, host: str, now: float) -> HostInfo:
        """:raises UserError: there is no such host."""

    def all_info(self, now: float) -> list[HostInfo]:
        """All hosts, by number."""

    def known(self) -> Iterable[KnownHost]:
        """For the checkpoint."""

    def open(self, session: Session, uid: int) -> None:
        """A client has come."""

    def request(self, session: Session, wish: RequestHosts, now: float) -> tuple[str, ...]:
        """Claim hosts for a client: those idle longest first. Fewer than asked for, or none, is fine.

        :raises UserError: the client is not known, or holds too much.
        """

    def confirm(self, session: Session, host: str) -> bool:
        """Whether a claim still holds."""

    def give_back(self, session: Session, hosts: Iterable[str] | None, now: float) -> int:
        """End a claim on each of these hosts, or all. :return: how many there were."""

    def reclaim(self, session: Session, held: Iterable[Held], now: float) -> list[Held]:
        """Claims that an earlier central daemon gave. :return: those that cannot be had again."""

    def close(self, session: Session, now: float, *, with_agents: bool = False) -> None:
        """A client has gone: its claims end; those that live with a guest only `with_agents`."""

    def sessions(self, host: str) -> list[Session]:
        """The clients on a host."""

    def tick(self, now: float) -> None:
        """To be called about once a second: what time alone changes."""

    def stats(self) -> Stats:
        """What it has done."""
