"""The load database in memory: states of hosts, choice of hosts, claims, fairness, notifications."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.load_database import EvictUser, KnownHost, Session, Tell
from agent.load_policy import Verdict, has_room
from agent.load_report import Report, uses
from migrate.errors import UserError
from migrate.mig_messages import (
    Event,
    GiveBack,
    Held,
    HostInfo,
    HostLost,
    HostState,
    MoreHosts,
    Priority,
    RequestHosts,
    Stats,
)

AGENT_GRACE_SECONDS = 60.0
"""A claim that lives with a guest ends if none has come within."""
NOTIFY_AGAIN_SECONDS = 2.0
"""A client that was told of a host and does not take it: then the next is told."""
CLAIMS_PER_CLIENT = 4096
PRIORITIES = len(Priority)


@dataclass(eq=False, slots=True)
class _Claim:
    session: Session
    uid: int
    host: _Host
    priority: int
    agent: bool
    since: float
    due: float = math.inf
    """when it is taken away, if its holder was asked to return it"""


@dataclass(eq=False, slots=True)
class _Host:
    name: str
    id: int
    last_up: float = 0.0
    machine: str = ""
    """as it last said"""
    report: Report | None = None
    reported: float = 0.0
    heard: float = 0.0
    guests: dict[tuple[int, int], int] = field(default_factory=dict)
    claims: list[_Claim] = field(default_factory=list)
    used: tuple[int, int, int] = (0, 0, 0)
    absent: bool = False
    """its connection has ended; it may be back before it counts as down"""
    version: int = 0
    """counts changes: entries of the heaps with another one are stale"""

    @property
    def up(self) -> bool:
        return self.report is not None

    def takes(self, priority: int) -> bool:
        report = self.report
        return (
            report is not None
            and not self.absent
            and report.verdict is Verdict.ACCEPTS
            and has_room(self.used, report.slots, priority)
        )

    def count(self) -> None:
        """Work out `used`: a claim and a guest of one user and priority fill one slot together."""
        slots = dict(self.guests)
        claimed: dict[tuple[int, int], int] = {}
        for claim in self.claims:
            key = (claim.uid, claim.priority)
            claimed[key] = claimed.get(key, 0) + 1
        for key, number in claimed.items():
            slots[key] = max(number, slots.get(key, 0))
        used = [0] * PRIORITIES
        for (_, priority), number in slots.items():
            used[priority] += number
        self.used = (used[0], used[1], used[2])

    def state(self) -> HostState:
        if self.report is None:
            return HostState.DOWN
        if self.report.verdict is not Verdict.ACCEPTS:
            return HostState(self.report.verdict.value)
        if not self.takes(Priority.NORMAL):
            return HostState.FULL
        return HostState.PART_USED if any(self.used) else HostState.IDLE


@dataclass(eq=False, slots=True)
class _Client:
    session: Session
    uid: int
    claims: list[_Claim] = field(default_factory=list)
    wish: RequestHosts | None = None
    """what it asked for in vain, and wants to be told of"""
    told: float = -math.inf
    """when it was last told"""


_Key = tuple[str, int]
"""An architecture and a priority: one heap each."""


class LoadBook:
    """As agent.load_database.LoadDatabase says."""

    def __init__(
        self,
        tell: Tell,
        evict: EvictUser,
        *,
        down_seconds: float = 180.0,
        give_back_seconds: float = 15.0,
    ) -> None:
        self._tell = tell
        self._evict = evict
        self._down_seconds = down_seconds
        self._give_back_seconds = give_back_seconds
        self._hosts: dict[str, _Host] = {}
        self._clients: dict[Session, _Client] = {}
        self._held: Counter[int] = Counter()
        """claims of each user"""
        self._waiting: dict[Session, _Client] = {}
        self._due: list[_Claim] = []
        self._agents: list[_Claim] = []
        self._heaps: dict[_Key, list[tuple[bool, float, str, int]]] = {}
        self._counts: Counter[str] = Counter()

    # ------------------------------------------------------------------ hosts

    def add_host(self, name: str, host_id: int, last_up: float = 0.0) -> None:
        host = self._hosts.get(name)
        if host is None:
            self._hosts[name] = _Host(name, host_id, last_up)
        else:
            host.id = host_id
            host.last_up = max(host.last_up, last_up)

    def report(self, host: str, report: Report, now: float, wall: float = 0.0) -> None:
        """:param wall: the time of day, in seconds since the epoch, for `last_up`."""
        report.check(host)
        record = self._record(host)
        record.report = report
        record.machine = report.machine
        record.reported = record.heard = now
        record.absent = False
        record.last_up = wall or record.last_up
        self._counts["reports"] += 1
        before, record.guests = record.guests, uses(report.guests)
        self._guests_came(record, before)
        if report.verdict is not Verdict.ACCEPTS:
            for claim in list(record.claims):
                self._lose(claim, report.reason or "it takes no guests any more")
        self._changed(record)
        self._offer(record, now)

    def heard(self, host: str, now: float) -> None:
        record = self._record(host)
        record.heard = now
        if record.absent:
            record.absent = False
            self._changed(record)
            self._offer(record, now)

    def absent(self, host: str) -> None:
        record = self._hosts.get(host)
        if record is not None:
            record.absent = True
            self._changed(record)

    def delete_host(self, host: str) -> None:
        record = self._record(host)
        if record.up:
            raise UserError(f"host {host}", "is up", "only a host that is down can be deleted")
        for claim in list(record.claims):
            self._lose(claim, "it was deleted")
        del self._hosts[host]

    def info(self, host: str, now: float) -> HostInfo:
        return self._info(self._record(host), now)

    def all_info(self, now: float) -> list[HostInfo]:
        hosts = sorted(self._hosts.values(), key=lambda host: (host.id, host.name))
        return [self._info(host, now) for host in hosts]

    def known(self) -> list[KnownHost]:
        return [KnownHost(host.name, host.last_up) for host in self._hosts.values()]

    def _record(self, name: str) -> _Host:
        try:
            return self._hosts[name]
        except KeyError:
            raise UserError(f"host {name}", "is not in the load database") from None

    @staticmethod
    def _info(host: _Host, now: float) -> HostInfo:
        report = host.report
        if report is None:
            return HostInfo(name=host.name, id=host.id, last_up=host.last_up)
        age = max(0.0, now - host.reported)
        return HostInfo(
            name=host.name,
            id=host.id,
            machine=report.machine,
            state=host.state(),
            accepts=report.verdict is Verdict.ACCEPTS,
            reason=report.reason,
            loads=report.loads,
            cpu_percent=report.cpu_percent,
            ready_queue=report.ready_queue,
            processors=report.processors,
            idle_seconds=report.idle_seconds + age,
            up_seconds=report.up_seconds + age,
            last_up=host.last_up,
            slots=report.slots,
            claims=len(host.claims),
            guests=report.guests,
        )

    def _guests_came(self, host: _Host, before: dict[tuple[int, int], int]) -> None:
        """Claims that live with a guest end when it is there: from then on it fills the slot."""
        for key, number in host.guests.items():
            for _ in range(number - before.get(key, 0)):
                claim = next(
                    (c for c in host.claims if c.agent and (c.uid, c.priority) == key), None
                )
                if claim is not None:
                    self._drop(claim)

    def _changed(self, host: _Host) -> None:
        """A host's slots or verdict are others now: put it where it is found."""
        host.count()
        host.version += 1
        report = host.report
        if report is None or host.absent or report.verdict is not Verdict.ACCEPTS:
            return
        entry = (any(host.used), host.reported - report.idle_seconds, host.name, host.version)
        for priority in range(PRIORITIES):
            if has_room(host.used, report.slots, priority):
                heap = self._heaps.setdefault((report.machine, priority), [])
                heapq.heappush(heap, entry)
                if len(heap) > 64 + 8 * len(self._hosts):
                    self._weed(heap)

    def _weed(self, heap: list[tuple[bool, float, str, int]]) -> None:
        heap[:] = [entry for entry in heap if self._fresh(entry) is not None]
        heapq.heapify(heap)

    def _fresh(self, entry: tuple[bool, float, str, int]) -> _Host | None:
        host = self._hosts.get(entry[2])
        return host if host is not None and host.version == entry[3] else None

    # ------------------------------------------------------------------ clients

    def open(self, session: Session, uid: int) -> None:
        if session not in self._clients:
            self._clients[session] = _Client(session, uid)

    def request(self, session: Session, wish: RequestHosts, now: float) -> tuple[str, ...]:
        client = self._client(session)
        if len(client.claims) + wish.count > CLAIMS_PER_CLIENT:
            raise UserError("request", f"more than {CLAIMS_PER_CLIENT} hosts for one client")
        self._counts["requests"] += 1
        machine = wish.machine or self._machine_of(session.host)
        excluded = {session.host, *wish.exclude}
        granted: list[str] = []
        for _ in range(wish.count):
            host = self._choose(machine, wish.priority, excluded)
            if host is None:
                break
            self._claim(client, host, wish.priority, wish.agent, now)
            granted.append(host.name)
        self._counts["granted"] += len(granted)
        missing = wish.count - len(granted)
        self._waiting.pop(session, None)
        client.wish = None
        if missing:
            self._counts["denied"] += missing
            if wish.notify:
                client.wish = wish
                self._waiting[session] = client
            if not self._held[client.uid]:
                self._ask_back(client, wish, now)
        return tuple(granted)

    def confirm(self, session: Session, host: str) -> bool:
        return any(claim.host.name == host for claim in self._client(session).claims)

    def give_back(self, session: Session, hosts: Iterable[str] | None, now: float) -> int:
        client = self._client(session)
        if hosts is None:
            hosts = [claim.host.name for claim in client.claims]
        returned = 0
        for name in hosts:
            claim = next((c for c in client.claims if c.host.name == name), None)
            if claim is not None:
                self._return(claim, now)
                returned += 1
        self._counts["returned"] += returned
        return returned

    def reclaim(self, session: Session, held: Iterable[Held], now: float) -> list[Held]:
        client = self._client(session)
        lost = []
        for wanted in held:
            host = self._hosts.get(wanted.host)
            # One that has not reported yet, to a new central daemon, is believed to be there.
            if host is None or (host.up and not self._may_keep(host, client.uid, wanted)):
                lost.append(wanted)
            else:
                self._claim(client, host, wanted.priority, wanted.agent, now)
        return lost

    @staticmethod
    def _may_keep(host: _Host, uid: int, wanted: Held) -> bool:
        """Whether the slot is there, or the user's own guest fills it."""
        if host.report is None or host.report.verdict is not Verdict.ACCEPTS:
            return False
        key = (uid, int(wanted.priority))
        claimed = sum((c.uid, c.priority) == key for c in host.claims)
        return host.takes(wanted.priority) or host.guests.get(key, 0) > claimed

    def close(self, session: Session, now: float, *, with_agents: bool = False) -> None:
        client = self._clients.pop(session, None)
        if client is None:
            return
        self._waiting.pop(session, None)
        for claim in list(client.claims):
            if with_agents or not claim.agent:
                self._return(claim, now)

    def sessions(self, host: str) -> list[Session]:
        return [session for session in self._clients if session.host == host]

    def stats(self) -> Stats:
        up = [host for host in self._hosts.values() if host.up]
        available = sum(host.takes(Priority.NORMAL) for host in up)
        return Stats(
            hosts=len(self._hosts),
            available=available,
            claims=sum(self._held.values()),
            clients=len(self._clients),
            requests=self._counts["requests"],
            granted=self._counts["granted"],
            denied=self._counts["denied"],
            returned=self._counts["returned"],
            lost=self._counts["lost"],
            asked_back=self._counts["asked_back"],
            reports=self._counts["reports"],
            idle_percent=100.0 * available / len(up) if up else 0.0,
        )

    def _client(self, session: Session) -> _Client:
        try:
            return self._clients[session]
        except KeyError:
            raise UserError("client", "is not known to the load database") from None

    def _machine_of(self, host: str) -> str:
        record = self._hosts.get(host)
        return record.machine if record is not None else ""

    # ------------------------------------------------------------------ choice and claims

    def _choose(self, machine: str, priority: int, excluded: set[str]) -> _Host | None:
        """The host that has been idle longest; one without guests before one with some."""
        heap = self._heaps.get((machine, priority))
        if heap is None:
            return None
        aside = []
        found = None
        while heap:
            host = self._fresh(heap[0])
            if host is None:
                heapq.heappop(heap)
            elif host.name in excluded:
                aside.append(heapq.heappop(heap))
            else:
                found = host
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    def _claim(self, client: _Client, host: _Host, priority: int, agent: bool, now: float) -> None:
        claim = _Claim(client.session, client.uid, host, int(priority), agent, now)
        host.claims.append(claim)
        client.claims.append(claim)
        self._held[client.uid] += 1
        if agent:
            self._agents.append(claim)
        self._changed(host)

    def _drop(self, claim: _Claim) -> None:
        """End a claim; whoever calls this has the host looked at again."""
        claim.host.claims.remove(claim)
        client = self._clients.get(claim.session)
        if client is not None:
            client.claims.remove(claim)
        self._held[claim.uid] -= 1
        if not self._held[claim.uid]:
            del self._held[claim.uid]
        if claim.agent:
            self._agents.remove(claim)
        if claim.due < math.inf:
            self._due.remove(claim)

    def _return(self, claim: _Claim, now: float) -> None:
        self._drop(claim)
        self._changed(claim.host)
        self._offer(claim.host, now)

    def _lose(self, claim: _Claim, reason: str) -> None:
        self._drop(claim)
        self._changed(claim.host)
        self._counts["lost"] += 1
        self._say(claim.session, HostLost(claim.host.name, reason[:256]))

    def _say(self, session: Session, event: Event) -> None:
        if session in self._clients:
            self._tell(session, event)

    # ------------------------------------------------------------------ waiting clients

    def _offer(self, host: _Host, now: float) -> None:
        """Tell one waiting client that this host can be had: the one whose user has the least."""
        if not self._waiting or not host.takes(Priority.HIGH):
            return
        suitable = [
            client
            for client in self._waiting.values()
            if client.wish is not None
            and now - client.told >= NOTIFY_AGAIN_SECONDS
            and host.takes(client.wish.priority)
            and host.name != client.session.host
            and host.name not in client.wish.exclude
        ]
        if suitable:
            # min() takes the first of equals: the one that has waited longest.
            chosen = min(suitable, key=lambda client: self._held[client.uid])
            chosen.told = now
            self._say(chosen.session, MoreHosts())

    # ------------------------------------------------------------------ fairness

    def _ask_back(self, client: _Client, wish: RequestHosts, now: float) -> None:
        """The user has no host and gets none: who has most is asked to return one."""
        if self._due and any(
            claim.host.name not in wish.exclude and claim.priority >= wish.priority
            for claim in self._due
        ):
            return  # One is on its way.
        rich, most = max(self._held.items(), key=lambda item: item[1], default=(0, 0))
        if most < 2 or rich == client.uid:
            return
        claims = [
            claim
            for other in self._clients.values()
            if other.uid == rich
            for claim in other.claims
            if claim.host.name != client.session.host and claim.host.name not in wish.exclude
        ]
        if not claims:
            return
        # The youngest has the least to lose.
        claim = max(claims, key=lambda claim: claim.since)
        claim.due = now + self._give_back_seconds
        self._due.append(claim)
        self._counts["asked_back"] += 1
        self._say(claim.session, GiveBack(claim.host.name, self._give_back_seconds))

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        for host in self._hosts.values():
            if host.up and now - host.heard > self._down_seconds:
                self._down(host)
            elif not host.up:
                # Claims from before a change of central daemon, on a host that has not come back.
                for claim in [c for c in host.claims if now - c.since > self._down_seconds]:
                    self._lose(claim, "it is down")
        for claim in [c for c in self._due if c.due <= now]:
            self._evict(claim.host.name, claim.uid, "another user has no host at all")
            self._lose(claim, "another user has no host at all")
            self._offer(claim.host, now)
        for claim in [c for c in self._agents if now - c.since > AGENT_GRACE_SECONDS]:
            self._return(claim, now)
        if any(now - client.told >= NOTIFY_AGAIN_SECONDS for client in self._waiting.values()):
            for host in self._hosts.values():
                if host.takes(Priority.HIGH):
                    self._offer(host, now)

    def _down(self, host: _Host) -> None:
        host.report = None
        host.guests = {}
        for claim in list(host.claims):
            self._lose(claim, "it is down")
        self._changed(host)
