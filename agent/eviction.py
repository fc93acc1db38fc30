"""Sends this host's guests home: they are frozen at once, and go as soon as home can be reached.

One whose home refuses it, or that cannot move just now, stays frozen and is tried again; if the host
welcomes guests meanwhile (its owner has gone), it runs on here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set

from agent.agents import Agent
from agent.handover import tell_nobody
from agent.hopping import hop
from agent.link import Hold, Offer
from agent.peer_errors import one_line
from agent.peers import AnswerLost, PeerUnreachable
from agent.this_host import RETRY_SECONDS, ThisHost
from migrate.errors import MigrateError
from migrate.pids import format_pid

log = logging.getLogger("migrate.eviction")
"""Silenced by `migd -s`."""

REASON_LETTERS = 200
REFUSED_SECONDS = 3.0
"""Between attempts that home has refused, or that the guest's state forbids."""
PATIENCE_SECONDS = 60.0
"""Of such attempts, before a guest may run on here. Home needs some of it to give up an attempt whose
migd was killed here."""


class Eviction:
    """For the running loop."""

    def __init__(self, here: ThisHost) -> None:
        self._here = here
        self._leaving: dict[str, str] = {}
        """guest → why it is to go"""

    def evict(self, uid: int | None, reason: str) -> int:
        """Freeze the guests of other hosts, and send them home.

        :param uid: whose; None for everybody's.
        :return: how many are told to go that were not yet.
        """
        return self._evict(lambda keeper, offer: uid in (None, offer.owner.uid), reason)

    def evict_guests(self, guests: Set[str], reason: str) -> int:
        """As `evict`, only some."""
        return self._evict(lambda keeper, offer: keeper.guest in guests, reason)

    def _evict(self, wanted: Callable[[Agent, Offer], bool], reason: str) -> int:
        reason = one_line(reason, REASON_LETTERS)
        count = 0
        for keeper in self._here.agents.all():
            offer = keeper.offer
            if keeper.role != "keeper" or offer is None or offer.home == self._here.name:
                continue
            if keeper.guest in self._leaving or not wanted(keeper, offer):
                continue
            keeper.link.send(Hold(reason))
            log.info("evicted %s: %s", _words(offer), reason)
            self._begin(keeper, offer, reason)
            count += 1
        return count

    def resume(self, keeper: Agent, reason: str) -> None:
        """An earlier migd has told this guest to go."""
        if keeper.guest not in self._leaving and keeper.offer is not None:
            self._begin(keeper, keeper.offer, reason)

    def reason(self, guest: str) -> str:
        """Why a guest is to go; "" if it is not."""
        return self._leaving.get(guest, "")

    def _begin(self, keeper: Agent, offer: Offer, reason: str) -> None:
        self._leaving[keeper.guest] = reason
        task = self._here.spawn(self._send_home(keeper, offer, reason))
        task.add_done_callback(lambda _: self._leaving.pop(keeper.guest, None))

    async def _send_home(self, keeper: Agent, offer: Offer, reason: str) -> None:
        here, told, last = self._here, "", time.monotonic() + PATIENCE_SECONDS
        while here.agents.find("keeper", keeper.guest) is keeper:
            pause = RETRY_SECONDS
            try:
                home = here.config.host_named(offer.home)
                await hop(here, keeper.guest, home, tell_nobody, reason=f"evicted: {reason}")
                log.info("%s is home again", _words(offer))
                return
            except (AnswerLost, PeerUnreachable) as error:
                failure, last = str(error), time.monotonic() + PATIENCE_SECONDS
            except MigrateError as error:
                failure = str(error)
                pause = REFUSED_SECONDS
                if time.monotonic() > last and here.load.host.accepts:
                    keeper.link.send(Hold(""))
                    log.info("%s runs on here: %s", _words(offer), failure)
                    return
            if here.agents.find("keeper", keeper.guest) is not keeper:
                return  # It has ended, or gone on otherwise.
            if failure != told:
                told = failure
                log.info("%s waits frozen: %s", _words(offer), failure)
            await asyncio.sleep(pause)


def _words(offer: Offer) -> str:
    """ "0x82 (python3 x.py) of alice on node1"."""
    command = one_line(offer.command)
    return f"{format_pid(offer.ids.pid)} ({command}) of {offer.owner.name} on {offer.home}"
