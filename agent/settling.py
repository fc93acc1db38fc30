"""What did not end by itself: transactions in doubt, agents that were killed, what a restart or reboot left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path

from agent import peer_messages
from agent.agents import Agent, clean_up
from agent.cgroups import Cgroup, guest_path
from agent.fresh_tree import put_back
from agent.journal import Entry, Side, State
from agent.link import Verdict
from agent.this_host import RETRY_SECONDS, ThisHost, in_doubt
from criu_hooks.proc import pid_starttime
from migrate import paths
from migrate.errors import MigrateError, PeerError

log = logging.getLogger(__name__)

ENDING_SECONDS = 5.0
"""how long the killed may take to be dead"""
_GUARD_KILLED = "the guard was killed"
_KEEPER_KILLED = "the keeper was killed"


class Settling:
    """Brings every entry of this host's journal to an end that both hosts agree on."""

    def __init__(self, here: ThisHost) -> None:
        self._here = here
        self._journal = here.journal

    # ------------------------------------------------------------------ after a start of migd

    def settle_left(self) -> None:
        """What an earlier migd, or an earlier life of this host, left undone."""
        for entry in self._journal.in_state(State.BEGUN, State.COMMITTED, State.OFFERED):
            self._settle_left(entry)
        for entry in self._journal.in_state(State.RESUMED):
            if entry.boot_id != self._here.boot_id:
                continue
            if entry.side is Side.DESTINATION and not self._here.agents.find("keeper", entry.guest):
                self._give_up(entry, _KEEPER_KILLED)
            elif _fresh(entry) and not self._here.agents.find("guard", entry.guest):
                self._guard_lost(entry)

    def _settle_left(self, entry: Entry) -> None:
        if self._here.agents.find("guard" if _fresh(entry) else "keeper", entry.guest) is not None:
            if entry.state is State.COMMITTED:
                self._here.spawn(self.settle(entry))
        elif entry.boot_id != self._here.boot_id:
            self._journal.move(
                entry.transaction,
                entry.side,
                State.ABORTED,
                after=entry.state,
                reason="host rebooted",
            )
        else:
            self._driver_lost(entry)

    # ------------------------------------------------------------------ agents that were killed

    def agent_ended(self, agent: Agent) -> None:
        """A guard or keeper has ended; if it had not finished its work, that is seen to."""
        for entry in self._journal.in_state(
            State.BEGUN, State.COMMITTED, State.OFFERED, State.RESUMED
        ):
            if entry.guest != agent.guest or agent.role != _driver_role(entry):
                continue
            hop = entry.side is Side.SOURCE and not _fresh(entry)
            if not hop:
                log.warning("%s: %s of %s was killed", entry.transaction, agent.role, entry.guest)
            self._driver_lost(entry)
            if not hop:
                return
        if paths.GUESTS_DIR.joinpath(f"{agent.role}-{agent.guest}").exists():
            clean_up(agent.role, agent.guest)

    def _driver_lost(self, entry: Entry) -> None:
        """Nobody drives this migration any more; its guard or keeper was killed."""
        if entry.side is Side.DESTINATION:
            self._give_up(entry, _KEEPER_KILLED)
        elif not _fresh(entry):
            self._hop_ended(entry)
        elif entry.state is State.BEGUN:
            self._roll_back(entry, _GUARD_KILLED)
        elif entry.state is State.COMMITTED:
            self._here.spawn(self.settle(entry))
        else:
            self._guard_lost(entry)

    def _guard_lost(self, entry: Entry) -> None:
        """The guest runs elsewhere, but its guard, which held its pipes and files, was killed.

        Nobody can take that over: guest and deputy end, as if killed.
        """
        if not self._journal.move(
            entry.transaction, Side.SOURCE, State.ENDED, after=entry.state, reason=_GUARD_KILLED
        ):
            return
        tree = Cgroup(guest_path("guard", entry.guest, "tree"))
        tree.kill()
        with contextlib.suppress(OSError, MigrateError):
            if pid_starttime(entry.pid) == entry.starttime_ticks:
                os.kill(entry.pid, signal.SIGKILL)
        tree.wait_empty(ENDING_SECONDS)
        clean_up("guard", entry.guest)
        log.warning("%s: lost: the guard of pid %d was killed", entry.transaction, entry.pid)
        self._here.spawn(self._end_there(entry.guest, entry.peer))

    async def _end_there(self, guest: str, name: str) -> None:
        """Have a guest ended that nobody stands for at home any more."""
        if name == self._here.name:
            self._here.end_guest(guest, "its guard was killed")
            return
        while True:
            try:
                await self._here.ask(name, peer_messages.DropGuest(guest), peer_messages.GuestIs)
                return
            except PeerError as error:
                log.info("%s: to be ended on %s: %s", guest, name, error)
                await asyncio.sleep(RETRY_SECONDS)

    def _hop_ended(self, entry: Entry) -> None:
        """The keeper that drove a hop has ended in the middle of it, and its guest with it."""
        if entry.state is State.BEGUN:
            self._journal.move(
                entry.transaction,
                Side.SOURCE,
                State.ABORTED,
                after=State.BEGUN,
                reason=_KEEPER_KILLED,
            )
        elif entry.state is State.COMMITTED:
            self._here.spawn(self.settle(entry))

    def _give_up(self, entry: Entry, reason: str) -> None:
        state = State.ABORTED if entry.state is State.OFFERED else State.ENDED
        clean_up("keeper", entry.guest)
        self._journal.move(entry.transaction, entry.side, state, after=entry.state, reason=reason)

    def _roll_back(self, entry: Entry, reason: str) -> None:
        """Not committed, and nobody drives it any more: the original runs on."""
        if self._journal.move(
            entry.transaction, Side.SOURCE, State.ABORTED, after=State.BEGUN, reason=reason
        ):
            self._put_back(entry)
            log.info("%s: rolled back: %s", entry.transaction, reason)

    def _put_back(self, entry: Entry) -> None:
        put_back(Cgroup(guest_path("guard", entry.guest, "tree")), Path(entry.origin_cgroup))
        clean_up("guard", entry.guest)

    # ------------------------------------------------------------------ in doubt

    def doubt(self, transaction: str) -> None:
        """A guard or keeper has committed, and the destination is silent."""
        entry = self._journal.find(transaction, Side.SOURCE)
        if entry is not None:
            self._here.spawn(self.settle(entry))

    def refuse_if_doubtful(self, pid: int) -> None:
        """Raise HostError if this process stands frozen until it is known whether it runs elsewhere.

        Moved again it would leave its frozen cgroup, and there would be two of it.
        """
        for entry in self._journal.in_state(State.BEGUN, State.COMMITTED):
            if entry.pid != pid or not _fresh(entry) or entry.boot_id != self._here.boot_id:
                continue
            starttime = -1
            with contextlib.suppress(OSError, MigrateError):
                starttime = pid_starttime(pid)
            if starttime == entry.starttime_ticks:
                raise in_doubt(entry)

    async def settle(self, entry: Entry) -> None:
        """Ask the destination for its record until it answers, or an administrator has decided."""
        told = ""
        while self._undecided(entry):
            try:
                answer = await self._here.ask(
                    entry.peer,
                    peer_messages.AskOutcome(entry.transaction),
                    peer_messages.OutcomeIs,
                )
            except MigrateError as error:
                if str(error) != told:
                    told = str(error)
                    log.info("%s: in doubt: %s", entry.transaction, error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            same_boot = answer.boot_id == entry.peer_boot_id
            if same_boot and answer.state in (State.RESUMED, State.ENDED):
                self.conclude(entry, resumed=True)
                return
            if not same_boot or answer.state == State.ABORTED:
                self.conclude(entry, resumed=False)
                return
            await asyncio.sleep(RETRY_SECONDS)

    def conclude(self, entry: Entry, *, resumed: bool) -> None:
        """It is known now whether the guest has ever run at the destination. The first word counts."""
        if not self._undecided(entry):
            return
        log.info(
            "%s: settled: %s", entry.transaction, "resumed there" if resumed else "aborted there"
        )
        driver = self._here.agents.find(_driver_role(entry), entry.guest)
        if driver is not None:
            driver.link.send(Verdict(resumed))
        elif not _fresh(entry):
            state = State.RESUMED if resumed else State.ABORTED
            self._journal.move(entry.transaction, Side.SOURCE, state, after=State.COMMITTED)
        elif resumed:
            self._guard_lost(entry)
        elif self._journal.move(
            entry.transaction, Side.SOURCE, State.ABORTED, after=State.COMMITTED
        ):
            self._put_back(entry)

    def _undecided(self, entry: Entry) -> bool:
        now = self._journal.find(entry.transaction, entry.side)
        return now is not None and now.state is State.COMMITTED


def _fresh(entry: Entry) -> bool:
    """Whether it is a first move at its source: there a guard drives, everywhere else a keeper."""
    return entry.side is Side.SOURCE and bool(entry.origin_cgroup)


def _driver_role(entry: Entry) -> str:
    return "guard" if _fresh(entry) else "keeper"
