"""This host in the load database: its samples, its verdict, its slots, its report.

Its own word is the last one: whatever the central daemon has promised, an offer is judged here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from agent.load_policy import Judgement, Thresholds, Verdict, has_room, judge_host
from agent.load_report import Guests, Report, uses
from agent.load_sampling import Sample, Sampler
from migrate import paths
from migrate.config import Config
from migrate.errors import HostError, PeerError
from migrate.mig_messages import GuestCount, HostInfo, HostState, Priority, SetLimits

log = logging.getLogger(__name__)

CountGuests = Callable[[], Guests]
OnChange = Callable[[], None]
OnActive = Callable[[str], None]
T = TypeVar("T")

AWAIT_SECONDS = 10.0
"""Less than a client waits for any answer."""


class LoadHost:
    """Samples in the running loop, from `start` to `close`."""

    def __init__(
        self,
        config: Callable[[], Config],
        count_guests: CountGuests,
        on_change: OnChange,
        on_active: OnActive,
        *,
        sampler: Sampler | None = None,
        blocked_file: Path = paths.BLOCKED_FILE,
        loadavg_file: Path = paths.LOADAVG_FILE,
    ) -> None:
        """
        :param count_guests: the guests that run here now.
        :param on_change: called when the verdict or the slots are others than before.
        :param on_active: called with the reason when the host's owner wants it back while it has
            guests: the verdict has gone from ACCEPTS to ACTIVE, or is ACTIVE at the start.
        """
        self._config = config
        self._count_guests = count_guests
        self._on_change = on_change
        self._on_active = on_active
        self._sampler = sampler or Sampler()
        self._blocked_file = blocked_file
        self._loadavg_file = loadavg_file
        self._limits = SetLimits()
        self._blocked = ""
        self._sample: Sample | None = None
        self._judgement: Judgement | None = None
        self._guests: Guests = ()
        self._task: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()
        self._coming_and_going = asyncio.Event()
        self._owner_came = -math.inf
        """when it was last known that the owner is here, input apart; by the monotonic clock"""
        self._complained = False

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Take the first sample; afterwards there is always a report."""
        with suppress(OSError):
            self._blocked = (
                self._blocked_file.read_text(errors="replace").strip()[:200] or "blocked"
            )
        await self._look()
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        """Sample no more."""
        if self._task is not None:
            self._task.cancel()
        self._loadavg_file.unlink(missing_ok=True)

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config().sample_seconds):
                    await self._look_now.wait()
            self._look_now.clear()
            try:
                await self._look()
            except (OSError, ValueError) as error:
                if not self._complained:
                    self._complained = True
                    log.error("load cannot be sampled: %s", error)

    async def _look(self) -> None:
        self._sample = await asyncio.to_thread(self._sampler.sample)
        self._judge()
        await asyncio.to_thread(self._publish, self.info(0.0))

    # ------------------------------------------------------------------ verdict

    def thresholds(self) -> Thresholds:
        """The configured ones, or those set at run time."""
        configured = Thresholds.of(self._config())
        return Thresholds(
            _either(self._limits.idle_seconds, configured.idle_seconds),
            _either(self._limits.load_accept, configured.accept),
            _either(self._limits.load_stop, configured.stop),
        )

    @property
    def slots(self) -> int:
        """Guests of one priority taken at once."""
        asked = _either(self._limits.guest_slots, self._config().guest_slots)
        return asked or os.cpu_count() or 1

    def _refusal(self) -> str:
        return self._blocked or ("" if self._config().accept_guests else "accept_guests = false")

    def _judge(self) -> None:
        sample = self._sample
        assert sample is not None
        before = self._judgement
        self._judgement = judge_host(
            before.verdict if before is not None else None,
            sample.loads_each,
            min(sample.idle_seconds, time.monotonic() - self._owner_came),
            self.thresholds(),
            refusal=self._refusal(),
        )
        guests = self._count_guests()
        # Who knows for how long nobody has looked, at the start.
        was_open = before is None or before.accepts
        if was_open and guests and self._judgement.verdict is Verdict.ACTIVE:
            self._on_active(self._judgement.reason)
        if (
            before is None
            or before.verdict is not self._judgement.verdict
            or guests != self._guests
        ):
            self._guests = guests
            self._on_change()

    def owner_came(self) -> None:
        """A login, or the owner's word: as good as input."""
        self._owner_came = time.monotonic()
        if self._sample is not None:
            self._judge()

    @property
    def accepts(self) -> bool:
        """Whether guests are welcome now."""
        return self._judgement is not None and self._judgement.accepts

    def guests_changed(self) -> None:
        """A guest has come or gone."""
        self._coming_and_going.set()
        if self._sample is not None and self._count_guests() != self._guests:
            self._judge()

    def reconsider(self) -> None:
        """The settings are others now."""
        self._look_now.set()

    def set_limits(self, limits: SetLimits) -> None:
        """Other thresholds until migd ends. :raises HostError: they contradict each other."""
        merged = SetLimits(
            _either(limits.idle_seconds, self._limits.idle_seconds),
            _either(limits.load_accept, self._limits.load_accept),
            _either(limits.load_stop, self._limits.load_stop),
            _either(limits.guest_slots, self._limits.guest_slots),
        )
        before, self._limits = self._limits, merged
        now = self.thresholds()
        if any(accept > stop for accept, stop in zip(now.accept, now.stop, strict=True)):
            self._limits = before
            raise HostError("load_accept", "is above load_stop", "set both")
        log.info("thresholds: %s, %d slots", now, self.slots)
        self._look_now.set()
        self._on_change()

    def block(self, reason: str) -> None:
        """Take no guests, until `bring`. :raises HostError: it would be forgotten at a restart."""
        self._blocked = reason.strip()[:200] or "blocked"
        self._judge()
        try:
            self._blocked_file.write_text(f"{self._blocked}\n")
        except OSError as error:
            raise HostError(
                str(self._blocked_file), f"cannot be written: {error.strerror}", "it holds for now"
            ) from None

    async def await_gone(self) -> int:
        """Return when there are no guests, or after some seconds. :return: how many there are."""
        with suppress(TimeoutError):
            async with asyncio.timeout(AWAIT_SECONDS):
                while self._count_guests():
                    self._coming_and_going.clear()
                    await self._coming_and_going.wait()
        return sum(guest.count for guest in self._count_guests())

    def bring(self) -> None:
        """Undo `block`."""
        self._blocked = ""
        self._judge()
        self._blocked_file.unlink(missing_ok=True)

    def check_offer(self, priority: int, *, chosen: bool) -> None:
        """Whether one more guest may come.

        :param chosen: it is sent here by choice. One that is sent by name needs no idle host.
        :raises PeerError: the host is in use, or full, or blocked.
        """
        name = self._config().name
        if self._blocked:
            raise PeerError(f"host {name}", f"takes no guests: {self._blocked}")
        if not chosen:
            return
        if self._judgement is None or not self._judgement.accepts:
            reason = self._judgement.reason if self._judgement else "migd is starting"
            raise PeerError(f"host {name}", f"takes no guests now: {reason}", "choose another host")
        used = [0] * len(Priority)
        for (_, kind), count in uses(self._count_guests()).items():
            used[kind] += count
        if not has_room((used[0], used[1], used[2]), self.slots, priority):
            raise PeerError(f"host {name}", "is full", "choose another host")

    # ------------------------------------------------------------------ what it tells

    def report(self) -> Report:
        """For the central daemon."""
        sample, judgement = self._sample, self._judgement
        assert sample is not None and judgement is not None
        return Report(
            machine=os.uname().machine,
            verdict=judgement.verdict,
            reason=judgement.reason,
            loads=sample.loads,
            cpu_percent=sample.cpu_percent,
            ready_queue=sample.ready_queue,
            processors=sample.processors,
            idle_seconds=sample.idle_seconds,
            up_seconds=sample.up_seconds,
            slots=self.slots,
            guests=self._count_guests(),
        )

    def info(self, last_up: float) -> HostInfo:
        """This host's own record; its state is what it knows without the claims on it."""
        report = self.report()
        config = self._config()
        state = HostState.IDLE
        if report.verdict is not Verdict.ACCEPTS:
            state = HostState(report.verdict.value)
        elif report.guests:
            used = sum(guest.count for guest in report.guests)
            state = HostState.FULL if used >= report.slots else HostState.PART_USED
        return HostInfo(
            name=config.name,
            id=config.this_host.id,
            machine=report.machine,
            state=state,
            accepts=report.verdict is Verdict.ACCEPTS,
            reason=report.reason,
            loads=report.loads,
            cpu_percent=report.cpu_percent,
            ready_queue=report.ready_queue,
            processors=report.processors,
            idle_seconds=report.idle_seconds,
            up_seconds=report.up_seconds,
            last_up=last_up,
            slots=report.slots,
            guests=report.guests,
        )

    def _publish(self, info: HostInfo) -> None:
        new = self._loadavg_file.with_suffix(".new")
        with suppress(OSError):
            new.write_bytes(msgspec.json.encode(info) + b"\n")
            new.chmod(0o644)
            new.replace(self._loadavg_file)


def _either(first: T | None, second: T) -> T:
    return second if first is None else first


def count_guests(guests: list[tuple[int, str, str, int]]) -> Guests:
    """Sums up (uid, user, home, priority) of each guest."""
    counts: dict[tuple[int, str, str, int], int] = {}
    for guest in guests:
        counts[guest] = counts.get(guest, 0) + 1
    return tuple(
        GuestCount(uid, user, home, Priority(priority), number)
        for (uid, user, home, priority), number in sorted(counts.items())
    )
