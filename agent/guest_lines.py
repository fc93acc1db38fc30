"""Lifelines as migd sees them: connected for a hop, made anew after a cut, given up with a lost guest or home."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from agent import peer_messages
from agent.agents import Agent
from agent.link import Attach, GuestLost
from agent.peer_pool import REFILL_SECONDS
from agent.this_host import RETRY_SECONDS, ThisHost, guest_gone
from migrate.errors import HostError, MigrateError

log = logging.getLogger(__name__)


async def connect_next(here: ThisHost, guest: str, name: str) -> None:
    """Connect the guard here with the keeper that waits for its guest on host `name`. Raises MigrateError."""
    guard = here.agents.find("guard", guest)
    if guard is None:
        raise HostError(f"guest {guest}", "has no guard at home any more")
    await _connect(here, guard, Attach("next", name))


async def _connect(here: ThisHost, guard: Agent, attach: Attach) -> None:
    """Give a guard a fresh connection with its guest's keeper, which may be here. Raises MigrateError."""
    if attach.host == here.name:
        _connect_here(here, guard, attach)
        return
    connection = await here.peers.raw.take(here.config.host_named(attach.host), REFILL_SECONDS)
    try:
        connection.begin("lifeline", guard.guest)
        if guard.link.send(attach, (connection.fd_in, connection.fd_out)):
            connection.detach()
    finally:
        connection.close()


def _connect_here(here: ThisHost, guard: Agent, attach: Attach) -> None:
    keeper = here.agents.find("keeper", guard.guest)
    if keeper is None:
        raise guest_gone(guard.guest)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # The receivers close each descriptor by itself; an incoming connection has a third, its hold.
        end = theirs.fileno()
        keeper.link.send(Attach("lifeline", attach.host), (end, end, end))
        guard.link.send(attach, (ours.fileno(), ours.fileno()))


class GuestLines:
    """The cut ones, and the tasks that see to them."""

    def __init__(self, here: ThisHost) -> None:
        self._here = here
        self._reconnecting: set[tuple[str, str]] = set()
        self._home_watches: dict[str, asyncio.Task[None]] = {}

    def reconnect(self, guard: Agent, name: str) -> None:
        """A guard has lost its lifeline to host `name`: again and again until it is back."""
        key = (guard.guest, name)
        if key not in self._reconnecting:
            self._reconnecting.add(key)
            task = self._here.spawn(self._reconnect(guard, name))
            task.add_done_callback(lambda _: self._reconnecting.discard(key))

    def home_silent(self, keeper: Agent, back: bool) -> None:
        """A keeper has not heard from home for long, or (`back`) does again."""
        if keeper.guest in self._home_watches:
            self._home_watches.pop(keeper.guest).cancel()
        if not back:
            self._home_watches[keeper.guest] = self._here.spawn(self._watch_home(keeper))

    async def _reconnect(self, guard: Agent, name: str) -> None:
        deadline = time.monotonic() + self._here.config.lost_seconds
        while self._here.agents.find(guard.role, guard.guest) is guard:
            try:
                if not await self._is_there(guard.guest, name):
                    guard.link.send(GuestLost(name, f"host {name} does not have it any more"))
                    return
                await _connect(self._here, guard, Attach("lifeline", name))
                return
            except MigrateError as error:
                log.info("%s: no lifeline yet: %s", guard.guest, error)
                if time.monotonic() > deadline:
                    guard.link.send(GuestLost(name, f"host {name} is silent"))
                    return
                await asyncio.sleep(RETRY_SECONDS)

    async def _is_there(self, guest: str, name: str) -> bool:
        if name == self._here.name:
            return self._here.agents.find("keeper", guest) is not None
        question = peer_messages.AskGuest(guest)
        return (await self._here.ask(name, question, peer_messages.GuestIs)).present

    async def _watch_home(self, keeper: Agent) -> None:
        """A guest here is cut off from home: it goes on waiting, unless home does not know it any more."""
        here, offer = self._here, keeper.offer
        if offer is None or offer.home == here.name:
            return
        while here.agents.find("keeper", keeper.guest) is keeper:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                question = peer_messages.AskHome(keeper.guest)
                answer = await here.ask(offer.home, question, peer_messages.HomeIs)
            except MigrateError:
                continue
            if not answer.wanted or answer.boot_id != offer.home_boot_id:
                log.warning("%s: home does not know it any more", keeper.guest)
                here.end_guest(keeper.guest, "home does not know it any more")
                return
