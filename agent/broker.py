"""migd's work, put together: what clients ask for, and what guards and keepers say."""

from __future__ import annotations

import asyncio

from agent import administration
from agent.agents import Agent
from agent.command_offers import run_command
from agent.command_server import Client
from agent.eviction import Eviction
from agent.group_places import Places
from agent.group_travel import settle
from agent.group_words import Identity
from agent.groups import Groups
from agent.guest_lines import GuestLines
from agent.handover import Tell
from agent.hopping import move_guest, move_on
from agent.inspection import inspect_process
from agent.journal import Entry
from agent.leaving import leave
from agent.link import Failed, Hold, LifelineCut, NeedLifeline, Packet, Running
from agent.load_service import LoadService
from agent.peers import Peers
from agent.questions import Questions
from agent.settling import Settling
from agent.this_host import ThisHost
from criu_hooks.proc import pid_starttime
from migrate import messages
from migrate.command_wire import Request
from migrate.config import Config
from migrate.errors import MigrateError, UserError


class Broker:
    """All of it, for the running loop."""

    def __init__(self, config: Config, peers: Peers, criu_version: str) -> None:
        self._here = ThisHost(
            config,
            peers,
            criu_version,
            self._heard,
            self._ended,
            lambda uid, reason: self._eviction.evict(uid, reason),
        )
        self._eviction = Eviction(self._here)
        self._lines = GuestLines(self._here)
        self._settling = Settling(self._here)
        self.groups = Groups(self._here, self._eviction.evict_guests)
        self._moving: set[int] = set()
        self.questions = Questions(self._here, self.groups.travel)

    async def start(self) -> None:
        """Find agents again, and settle what was left undone."""
        self._here.agents.find_again()
        self._settling.settle_left()
        self.groups.start()
        await self._here.load.start()

    def reload(self) -> None:
        """Read the configuration again (SIGHUP); a wrong one is told and changes nothing."""
        self._here.reload()

    @property
    def config(self) -> Config:
        """As it was last read."""
        return self._here.config

    @property
    def load(self) -> LoadService:
        """This host's part in the load database."""
        return self._here.load

    def close(self) -> None:
        """Agents run on."""
        self.groups.close()
        self._here.close()

    # ------------------------------------------------------------------ clients

    async def move(
        self, request: messages.Move, caller_uid: int, caller_pid: int, tell: Tell
    ) -> messages.Reply:
        """Move a process for a client of this host. Raises MigrateError."""
        pid = request.pid
        if pid in self._moving:
            raise UserError(f"pid {pid}", "is being moved already", "wait for that to end")
        self._moving.add(pid)
        try:
            entry = self._deputy(pid)
            if entry is not None:
                before = self.groups.travel.numbers([Identity(pid, entry.starttime_ticks)])
                moved = await move_on(self._here, request, entry, caller_uid, tell)
                self.groups.travel.catch_up(pid, before)
                return moved
            if inmate := Places.of(self._here).inmate(pid):
                return await move_guest(self._here, request, inmate.offer, caller_uid, tell)
            self._settling.refuse_if_doubtful(pid)
            return await self._move_process(request, caller_uid, caller_pid, tell)
        finally:
            self._moving.discard(pid)

    async def run_command(self, request: Request, client: Client) -> None:
        """Have a command run elsewhere for a client of this host. Raises MigrateError."""
        await run_command(self._here, request, client)

    async def _move_process(
        self, request: messages.Move, caller_uid: int, caller_pid: int, tell: Tell
    ) -> messages.Reply:
        report = await asyncio.to_thread(
            inspect_process, request.pid, caller_uid, caller_pid, self._here.config
        )
        if report.obstacles or report.tree is None:
            return messages.Refused(
                tuple(messages.Obstacle(o.subject, o.reason, o.remedy) for o in report.obstacles)
            )
        notes = tuple(map(str, report.notes))
        if request.check_only:
            return messages.Checked(request.pid, notes)
        members = report.tree.members
        before = self.groups.travel.numbers(Identity(p.pid, p.starttime_ticks) for p in members)
        departed = await leave(self._here, request, report.tree, tell)
        self.groups.travel.catch_up(request.pid, before)
        return messages.Moved(
            request.pid, departed.destination, departed.frozen_ms, departed.sent_bytes, notes
        )

    def _deputy(self, pid: int) -> Entry | None:
        """The migration that made this process a deputy, if it is one and still the same process."""
        entry = self._here.journal.deputy(pid)
        if entry is None:
            return None
        try:
            same = pid_starttime(pid) == entry.starttime_ticks
        except (OSError, MigrateError):
            same = False
        return entry if same else None

    def list_guests(self, caller_uid: int) -> messages.Guests:
        """What `migctl ps` shows to this user."""
        return administration.list_guests(self._here, caller_uid, self._eviction.reason)

    def history(self, caller_uid: int, count: int) -> messages.History:
        """What `migctl log` shows to this user."""
        return administration.history(self._here, caller_uid, count)

    async def recover(self, request: messages.Recover) -> messages.Recovered:
        """Settle transactions in doubt, and say how."""
        return await administration.recover(self._here, self._settling, request)

    # ------------------------------------------------------------------ guards and keepers

    def _heard(self, agent: Agent, packet: Packet) -> None:
        match packet:
            case NeedLifeline(host):
                self._lines.reconnect(agent, host)
            case LifelineCut(back):
                self._lines.home_silent(agent, back)
            case Running():
                settle(self._here, [agent.offer])
            case Hold(reason) if reason:
                self._eviction.resume(agent, reason)
            case Failed(in_doubt=True) as failed:
                self._settling.doubt(failed.transaction)

    def _ended(self, agent: Agent) -> None:
        for queue in agent.waiting:
            queue.put_nowait(None)
        self._settling.agent_ended(agent)
        if agent.role == "keeper" and agent.offer is not None:
            self._here.book.unsettle(agent.offer.transaction)
        self._here.load.host.guests_changed()
