"""migd's work: what a client or a peer asks for is checked, arranged with other hosts, and handed to agents."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import pwd
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from agent import peer_messages
from agent.agents import Agent, Agents, clean_up
from agent.cgroups import Cgroup, guest_path
from agent.fresh_tree import put_back
from agent.hosting import cpu_features, judge, load_per_processor
from agent.journal import Entry, Journal, Side, State
from agent.link import (
    Attach,
    Departed,
    DropNext,
    EndGuest,
    Failed,
    GuestLost,
    LifelineCut,
    NeedLifeline,
    Offer,
    Owner,
    Packet,
    Progress,
    StartDeparture,
    TreeIds,
    Verdict,
)
from agent.peers import AnswerLost, IncomingConnection, Peers, RawConnection
from agent.selection import choose_host
from criu_hooks.fds import FileKind
from criu_hooks.namespaces import Namespaces
from criu_hooks.obstacles import Obstacle, file_subject
from criu_hooks.preflight import Report, check, examine
from criu_hooks.proc import boot_id, pid_starttime
from criu_hooks.tree import ProcessTree
from migrate import messages, paths
from migrate.config import Config, Host, load_config
from migrate.errors import HostError, MigrateError, PeerError, UserError
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

OFFER_SECONDS = 20.0
SECOND_CHANCE_SECONDS = 3.0
HOP_SECONDS = 3600.0
RETRY_SECONDS = 1.0
SYSTEM_DIRECTORIES = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/opt",
    "/var/lib",
    "/var/log",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/boot",
)
VIEW_DIRECTORIES = ("/home", "/tmp", "/var/tmp")

Tell = Callable[[messages.Progress], Awaitable[None]]


class Broker:
    """All of it, for the running loop."""

    def __init__(self, config: Config, peers: Peers, criu_version: str) -> None:
        self._config = config
        self._peers = peers
        self._criu_version = criu_version
        self._journal = Journal()
        self._boot_id = boot_id()
        self._tasks: set[asyncio.Task[None]] = set()
        self._moving: set[int] = set()
        self._home_watches: dict[str, asyncio.Task[None]] = {}
        self._reconnecting: set[tuple[str, str]] = set()
        self.agents = Agents(self._heard, self._ended)

    # ------------------------------------------------------------------ start and stop

    def start(self) -> None:
        """Find agents again, and settle what was left undone."""
        self.agents.find_again()
        for entry in self._journal.in_state(State.BEGUN, State.COMMITTED, State.OFFERED):
            self._settle_left(entry)
        for entry in self._journal.in_state(State.RESUMED):
            if entry.boot_id != self._boot_id:
                continue
            if entry.side is Side.DESTINATION and not self.agents.find("keeper", entry.guest):
                self._give_up(entry, "the keeper was killed")
            elif entry.origin_cgroup and not self.agents.find("guard", entry.guest):
                self._guard_lost(entry)

    def _settle_left(self, entry: Entry) -> None:
        """A transaction of which the journal says that it did not end."""
        fresh = entry.side is Side.SOURCE and entry.origin_cgroup
        role = "guard" if fresh else "keeper"
        if self.agents.find(role, entry.guest) is not None:
            if entry.state is State.COMMITTED:
                self._spawn(self._settle(entry))
            return
        if entry.boot_id != self._boot_id:
            self._journal.move(
                entry.transaction,
                entry.side,
                State.ABORTED,
                after=entry.state,
                reason="host rebooted",
            )
        elif entry.side is Side.DESTINATION:
            self._give_up(entry, "the keeper was killed")
        elif not fresh:
            self._hop_ended(entry)
        elif entry.state is State.BEGUN:
            self._roll_back(entry, "the guard was killed")
        else:
            self._spawn(self._settle(entry))

    def is_peer(self, name: str) -> bool:
        """Whether a host of this name is configured now."""
        return any(host.name == name for host in self._config.peers)

    def reload(self) -> None:
        """Read the configuration again (SIGHUP); a wrong one is told and changes nothing."""
        try:
            self._config = load_config()
        except MigrateError as error:
            log.error("configuration not reloaded: %s", error)
        else:
            log.info("configuration reloaded, %d hosts", len(self._config.hosts))

    def close(self) -> None:
        """Agents run on."""
        for task in self._tasks:
            task.cancel()
        self.agents.close()
        self._journal.close()

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
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
                return await self._move_on(request, entry, caller_uid)
            report = await asyncio.to_thread(self._preflight, pid, caller_uid, caller_pid)
            if report.obstacles or report.tree is None:
                return messages.Refused(
                    tuple(
                        messages.Obstacle(o.subject, o.reason, o.remedy) for o in report.obstacles
                    )
                )
            notes = tuple(map(str, report.notes))
            if request.check_only:
                return messages.Checked(pid, notes)
            departed = await self._send_away(request, report.tree, tell)
            return messages.Moved(
                pid, departed.destination, departed.frozen_ms, departed.sent_bytes, notes
            )
        finally:
            self._moving.discard(pid)

    # ------------------------------------------------------------------ guests that move on

    def _deputy(self, pid: int) -> Entry | None:
        """The migration that made this process a deputy, if it is one and still the same process."""
        entry = self._journal.deputy(pid)
        if entry is None:
            return None
        try:
            same = pid_starttime(pid) == entry.starttime_ticks
        except (OSError, MigrateError):
            same = False
        return entry if same else None

    async def _move_on(
        self, request: messages.Move, entry: Entry, caller_uid: int
    ) -> messages.Reply:
        if caller_uid not in (0, entry.uid):
            raise UserError(
                f"pid {entry.pid}", f"belongs to {entry.user}", "only its owner or root moves it"
            )
        if self.agents.find("guard", entry.guest) is None:
            raise HostError(f"pid {entry.pid}", "its guard was killed", "it can only be ended")
        if request.check_only:
            return messages.Checked(entry.pid)
        if request.host:
            host = self._config.host_named(request.host)
        elif request.host_id:
            host = self._config.host_with_id(request.host_id)
        else:
            host = await choose_host(self._config, self._peers, frozenset({entry.peer}))
        if host.name == entry.peer:
            raise UserError(f"pid {entry.pid}", f"runs on {host.name} already", "name another host")
        try:
            moved = await self._ask_for_hop(entry, host)
        except AnswerLost:
            raise
        except MigrateError:
            guard = self.agents.find("guard", entry.guest)
            if guard is not None:
                guard.link.send(DropNext(host.name))
            raise
        self._journal.relocate(entry.transaction, host.name, "")
        return messages.Moved(entry.pid, host.name, moved.frozen_ms, moved.sent_bytes)

    async def _ask_for_hop(self, entry: Entry, host: Host) -> peer_messages.GuestMoved:
        if entry.peer == self._config.name:
            return await self._hop(entry.guest, host)
        question = peer_messages.encode(peer_messages.MoveGuest(entry.guest, host.name))
        control = self._peers.control(self._config.host_named(entry.peer))
        answer = peer_messages.decode_answer(await control.request(question, HOP_SECONDS))
        if not isinstance(answer, peer_messages.GuestMoved):
            raise PeerError(f"host {entry.peer}", "it answers with something else")
        return answer

    async def _hop(self, guest: str, host: Host) -> peer_messages.GuestMoved:
        """Send a guest of this host on to another, or home."""
        keeper = self.agents.find("keeper", guest)
        if keeper is None or keeper.offer is None:
            raise HostError(f"guest {guest}", "is not here any more", "look with `migctl ps`")
        here = self._config.name
        if host.name == here:
            raise UserError(f"guest {guest}", f"runs on {here} already")
        tree = await asyncio.to_thread(self._preflight_guest, keeper.offer)
        offer = msgspec.structs.replace(
            keeper.offer,
            transaction=secrets.token_hex(6),
            source=here,
            epoch=keeper.offer.epoch + 1,
            memory_bytes=sum(p.status.dump_bytes for p in tree.members),
            cpu_features=cpu_features(),
        )
        question = peer_messages.encode(peer_messages.MakeOffer(offer))
        bulk_task = asyncio.create_task(self._peers.raw.take(host))
        try:
            control = self._peers.control(host)
            answer = peer_messages.decode_answer(await control.request(question, OFFER_SECONDS))
            if not isinstance(answer, peer_messages.Accepted):
                raise PeerError(f"host {host.name}", "it answers an offer with something else")
            bulk = await bulk_task
            bulk.begin("bulk", guest)
            await self._have_home_connect(offer, host)
            start = StartDeparture(
                offer=offer,
                destination=host.name,
                destination_boot_id=answer.boot_id,
                starttime_ticks=0,
                host_pid=offer.ids.pid,
                ghost_limit_bytes=self._config.ghost_limit_bytes,
                lost_seconds=self._config.lost_seconds,
            )
            queue: asyncio.Queue[Packet] = asyncio.Queue()
            keeper.waiting.append(queue)
            try:
                keeper.link.send(start, (bulk.fd_in, bulk.fd_out))
                bulk.detach()
                departed = await self._follow(keeper, queue, _tell_nobody)
            finally:
                keeper.waiting.remove(queue)
        finally:
            if not bulk_task.done():
                bulk_task.cancel()
            elif not bulk_task.cancelled() and bulk_task.exception() is None:
                bulk_task.result().close()
        return peer_messages.GuestMoved(departed.frozen_ms, departed.sent_bytes)

    def _preflight_guest(self, offer: Offer) -> ProcessTree:
        pid = _host_pid(offer)
        tree = ProcessTree.capture(pid)
        obstacles = examine(
            tree,
            offer.owner.uid,
            expected_namespaces=Namespaces.of(pid),
            in_view=self._in_view,
            ghost_limit_bytes=self._config.ghost_limit_bytes,
            link_remap=True,
        )
        if obstacles:
            raise obstacles[0].error()
        return tree

    async def _have_home_connect(self, offer: Offer, host: Host) -> None:
        if offer.home == self._config.name:
            await self._connect_guest(offer.guest, host.name)
            return
        home = self._peers.control(self._config.host_named(offer.home))
        question = peer_messages.encode(peer_messages.ConnectGuest(offer.guest, host.name))
        await home.request(question, OFFER_SECONDS)

    async def _connect_guest(self, guest: str, name: str) -> None:
        """Connect the guard here with the keeper that waits for the guest on host `name`."""
        guard = self.agents.find("guard", guest)
        if guard is None:
            raise HostError(f"guest {guest}", "has no guard at home any more")
        fds = await self._lifeline_fds(guest, name)
        guard.link.send(Attach("next", name), fds)
        for fd in fds:
            os.close(fd)

    async def _lifeline_fds(self, guest: str, name: str) -> tuple[int, int]:
        """A fresh connection with a guest's keeper, which may be here; the caller owns both ends."""
        if name != self._config.name:
            connection = await self._peers.raw.take(self._config.host_named(name))
            try:
                connection.begin("lifeline", guest)
                return os.dup(connection.fd_in), os.dup(connection.fd_out)
            finally:
                connection.detach()
        keeper = self.agents.find("keeper", guest)
        if keeper is None:
            raise HostError(f"guest {guest}", "is not here any more")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ends = (theirs.fileno(), os.dup(theirs.fileno()), os.dup(theirs.fileno()))
            keeper.link.send(Attach("lifeline", name), ends)
            for fd in ends[1:]:
                os.close(fd)
            return os.dup(ours.fileno()), os.dup(ours.fileno())

    def _preflight(self, pid: int, caller_uid: int, caller_pid: int) -> Report:
        report = self._check(pid, caller_uid, caller_pid)
        if report.tree is None:
            return report
        # No keeper holds a pseudo-terminal yet; CRIU would only fail at the far end.
        terminals = tuple(
            Obstacle(
                file_subject(process, file),
                "a terminal, and those do not travel yet",
                "start the program with its input and output in files or pipes",
            )
            for process, file in report.tree.files()
            if file.kind is FileKind.TTY
        )
        return dataclasses.replace(report, obstacles=(*report.obstacles, *terminals))

    def _check(self, pid: int, caller_uid: int, caller_pid: int) -> Report:
        return check(
            pid,
            caller_uid,
            caller_pid=caller_pid,
            in_view=self._in_view,
            ghost_limit_bytes=self._config.ghost_limit_bytes,
            link_remap=True,
        )

    def _in_view(self, path: str) -> bool:
        local = (*SYSTEM_DIRECTORIES, *self._config.shared_paths)
        return not any(path == top or path.startswith(top + "/") for top in local)

    async def _send_away(self, request: messages.Move, tree: ProcessTree, tell: Tell) -> Departed:
        named = self._named_host(request)
        if named is not None:
            try:
                return await self._depart(tree, named, tell)
            except AnswerLost as error:
                # The control connection was dead without our knowing. Once more if a fresh one
                # can be had at once; an offer that did arrive ends by itself.
                log.info("%s; once more", error)
                try:
                    async with asyncio.timeout(SECOND_CHANCE_SECONDS):
                        await self._peers.control(named).hello()
                except (MigrateError, TimeoutError):
                    raise error from None
                return await self._depart(tree, named, tell)
        refused: set[str] = set()
        while True:
            host = await choose_host(self._config, self._peers, frozenset(refused))
            try:
                return await self._depart(tree, host, tell)
            except PeerError as error:
                # A refused offer is the next host's chance.
                log.info("%s", error)
                refused.add(host.name)
                if len(refused) >= len(self._config.peers):
                    raise

    def _named_host(self, request: messages.Move) -> Host | None:
        if request.host:
            host = self._config.host_named(request.host)
        elif request.host_id:
            host = self._config.host_with_id(request.host_id)
        else:
            return None
        if host.name == self._config.name:
            raise UserError(
                f"pid {request.pid}", f"runs on {host.name} already", "name another host"
            )
        return host

    async def _depart(self, tree: ProcessTree, host: Host, tell: Tell) -> Departed:
        offer = self._make_offer(tree)
        control = self._peers.control(host)
        question = peer_messages.encode(peer_messages.MakeOffer(offer))
        bulk_task = asyncio.create_task(self._peers.raw.take(host))
        lifeline_task = asyncio.create_task(self._peers.raw.take(host))
        connections: list[RawConnection] = []
        try:
            answer = peer_messages.decode_answer(await control.request(question, OFFER_SECONDS))
            if not isinstance(answer, peer_messages.Accepted):
                raise PeerError(f"host {host.name}", "it answers an offer with something else")
            connections = [await bulk_task, await lifeline_task]
            connections[0].begin("bulk", offer.guest)
            connections[1].begin("lifeline", offer.guest)
            start = StartDeparture(
                offer=offer,
                destination=host.name,
                destination_boot_id=answer.boot_id,
                starttime_ticks=tree.root.starttime_ticks,
                host_pid=tree.root.pid,
                ghost_limit_bytes=self._config.ghost_limit_bytes,
                lost_seconds=self._config.lost_seconds,
            )
            agent = self.agents.start("guard", offer.guest, None)
            fds = tuple(fd for c in connections for fd in (c.fd_in, c.fd_out))
            queue: asyncio.Queue[Packet] = asyncio.Queue()
            agent.waiting.append(queue)
            try:
                agent.link.send(start, fds)
                for connection in connections:
                    connection.detach()
                return await self._follow(agent, queue, tell)
            finally:
                agent.waiting.remove(queue)
        finally:
            for task in (bulk_task, lifeline_task):
                if not task.done():
                    task.cancel()
                elif not task.cancelled() and task.exception() is None:
                    task.result().close()

    async def _follow(self, agent: Agent, queue: asyncio.Queue[Packet], tell: Tell) -> Departed:
        while True:
            match await queue.get():
                case Progress(step, sent_bytes, at_ms):
                    await tell(messages.Progress(step, sent_bytes, at_ms))
                case Departed() as departed:
                    log.info(
                        "%s: moved to %s, frozen %.0f ms, %d bytes",
                        departed.transaction,
                        departed.destination,
                        departed.frozen_ms,
                        departed.sent_bytes,
                    )
                    return departed
                case Failed() as failed:
                    raise PeerError(failed.what, failed.reason, failed.remedy)
                case None:
                    raise HostError("guard", "was killed; the process runs on here", "try again")

    def _make_offer(self, tree: ProcessTree) -> Offer:
        root = tree.root
        credentials = root.credentials
        uid = credentials.uids.real
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            raise UserError(f"uid {uid}", "has no account on this host") from None
        return Offer(
            transaction=secrets.token_hex(6),
            guest=f"{root.pid}-{secrets.token_hex(6)}",
            home=self._config.name,
            source=self._config.name,
            owner=Owner(name, uid, credentials.gids.real, tuple(credentials.groups)),
            ids=TreeIds(root.pid, root.ppid, root.pgid, root.sid),
            epoch=1,
            memory_bytes=sum(p.status.dump_bytes for p in tree.members),
            machine=os.uname().machine,
            cpu_features=cpu_features(),
            criu_version=self._criu_version,
            hostname=os.uname().nodename,
            cwd=root.private.cwd,
            view=self._view_of(tree),
            command=" ".join(root.private.cmdline)[:200],
            freeze_limit_seconds=self._config.freeze_limit_seconds,
            cut_freeze_seconds=self._config.cut_freeze_seconds,
            home_boot_id=self._boot_id,
        )

    def _view_of(self, tree: ProcessTree) -> tuple[str, ...]:
        """What comes from home: where users write, and where this tree works and has files open."""
        found = list(VIEW_DIRECTORIES)
        wanted = [p.private.cwd for p in tree.members]
        wanted += [
            str(Path(f.link).parent)
            for _, f in tree.files()
            if f.link.startswith("/") and not f.deleted
        ]
        for directory in wanted:
            covered = any(directory == top or directory.startswith(top + "/") for top in found)
            if directory != "/" and not covered and self._in_view(directory):
                found.append(directory)
        return tuple(path for path in found if path not in self._config.shared_paths)

    # ------------------------------------------------------------------ agents

    def _heard(self, agent: Agent, packet: Packet) -> None:
        match packet:
            case NeedLifeline(host):
                if (agent.guest, host) not in self._reconnecting:
                    self._reconnecting.add((agent.guest, host))
                    task = self._spawn(self._connect_lifeline(agent, host))
                    task.add_done_callback(
                        lambda _: self._reconnecting.discard((agent.guest, host))
                    )
            case LifelineCut(back):
                if agent.guest in self._home_watches:
                    self._home_watches.pop(agent.guest).cancel()
                if not back:
                    self._home_watches[agent.guest] = self._spawn(self._watch_home(agent))
            case Failed(in_doubt=True) as failed:
                entry = self._journal.find(failed.transaction, Side.SOURCE)
                if entry is not None:
                    self._spawn(self._settle(entry))

    def _ended(self, agent: Agent) -> None:
        for queue in agent.waiting:
            queue.put_nowait(None)  # type: ignore[arg-type]
        side = Side.SOURCE if agent.role == "guard" else Side.DESTINATION
        for entry in self._journal.in_state(
            State.BEGUN, State.COMMITTED, State.OFFERED, State.RESUMED
        ):
            if entry.guest != agent.guest:
                continue
            if entry.side is Side.SOURCE and not entry.origin_cgroup:
                if agent.role == "keeper":
                    self._hop_ended(entry)
                continue
            if entry.side is not side:
                continue
            log.warning("%s: %s of %s was killed", entry.transaction, agent.role, entry.guest)
            if side is Side.DESTINATION:
                self._give_up(entry, "the keeper was killed")
            elif entry.state is State.BEGUN:
                self._roll_back(entry, "the guard was killed")
            elif entry.state is State.COMMITTED:
                self._spawn(self._settle(entry))
            else:
                self._guard_lost(entry)
            return
        if paths.GUESTS_DIR.joinpath(f"{agent.role}-{agent.guest}").exists():
            clean_up(agent.role, agent.guest)

    def _guard_lost(self, entry: Entry) -> None:
        """The guest runs elsewhere, but its guard, which held its pipes and files, was killed.

        Nobody can take that over: guest and deputy end, as if killed.
        """
        self._journal.move(
            entry.transaction,
            Side.SOURCE,
            State.ENDED,
            after=entry.state,
            reason="the guard was killed",
        )
        Cgroup(guest_path("guard", entry.guest, "tree")).kill()
        with contextlib.suppress(OSError, MigrateError):
            if pid_starttime(entry.pid) == entry.starttime_ticks:
                os.kill(entry.pid, signal.SIGKILL)
        clean_up("guard", entry.guest)
        log.warning("%s: lost: the guard of pid %d was killed", entry.transaction, entry.pid)
        self._spawn(self._end_there(entry.guest, entry.peer))

    async def _end_there(self, guest: str, name: str) -> None:
        """Have a guest ended that nobody stands for at home any more."""
        question = peer_messages.encode(peer_messages.DropGuest(guest))
        if name == self._config.name:
            self.end_guest(guest, "its guard was killed")
            return
        while True:
            try:
                control = self._peers.control(self._config.host_named(name))
                await control.request(question, OFFER_SECONDS)
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
                reason="the keeper was killed",
            )
        elif entry.state is State.COMMITTED:
            self._spawn(self._settle(entry))

    def _give_up(self, entry: Entry, reason: str) -> None:
        state = State.ABORTED if entry.state is State.OFFERED else State.ENDED
        clean_up("keeper", entry.guest)
        self._journal.move(entry.transaction, entry.side, state, after=entry.state, reason=reason)

    def _roll_back(self, entry: Entry, reason: str) -> None:
        """Not committed, and nobody drives it any more: the original runs on."""
        if self._journal.move(
            entry.transaction, Side.SOURCE, State.ABORTED, after=State.BEGUN, reason=reason
        ):
            put_back(Cgroup(guest_path("guard", entry.guest, "tree")), Path(entry.origin_cgroup))
            clean_up("guard", entry.guest)
            log.info("%s: rolled back: %s", entry.transaction, reason)

    async def _connect_lifeline(self, agent: Agent, name: str) -> None:
        """A guard has lost its lifeline: again and again until it is back or the guard is gone."""
        deadline = time.monotonic() + self._config.lost_seconds
        while self.agents.find(agent.role, agent.guest) is agent:
            try:
                if not await self._is_there(agent.guest, name):
                    agent.link.send(GuestLost(f"host {name} does not have it any more"))
                    return
                fds = await self._lifeline_fds(agent.guest, name)
            except MigrateError as error:
                log.info("%s: no lifeline yet: %s", agent.guest, error)
                if time.monotonic() > deadline:
                    agent.link.send(GuestLost(f"host {name} is silent"))
                    return
                await asyncio.sleep(RETRY_SECONDS)
                continue
            agent.link.send(Attach("lifeline", name), fds)
            for fd in fds:
                os.close(fd)
            return

    async def _watch_home(self, agent: Agent) -> None:
        """A guest here is cut off from home: it goes on waiting, unless home does not know it any more."""
        offer = agent.offer
        if offer is None or offer.home == self._config.name:
            return
        question = peer_messages.encode(peer_messages.AskHome(agent.guest))
        while self.agents.find("keeper", agent.guest) is agent:
            await asyncio.sleep(RETRY_SECONDS)
            try:
                control = self._peers.control(self._config.host_named(offer.home))
                answer = peer_messages.decode_answer(await control.request(question, OFFER_SECONDS))
            except MigrateError:
                continue
            if isinstance(answer, peer_messages.HomeIs) and (
                not answer.wanted or answer.boot_id != offer.home_boot_id
            ):
                log.warning("%s: home does not know it any more", agent.guest)
                self.end_guest(agent.guest, "home does not know it any more")
                return

    async def _is_there(self, guest: str, name: str) -> bool:
        if name == self._config.name:
            return self.agents.find("keeper", guest) is not None
        question = peer_messages.encode(peer_messages.AskGuest(guest))
        control = self._peers.control(self._config.host_named(name))
        answer = peer_messages.decode_answer(await control.request(question, OFFER_SECONDS))
        return isinstance(answer, peer_messages.GuestIs) and answer.present

    async def _settle(self, entry: Entry) -> None:
        """In doubt: ask the destination for its record until it answers."""
        host = self._config.host_named(entry.peer)
        question = peer_messages.encode(peer_messages.AskOutcome(entry.transaction))
        while True:
            try:
                data = await self._peers.control(host).request(question, OFFER_SECONDS)
                answer = peer_messages.decode_answer(data)
            except MigrateError as error:
                log.info("%s: in doubt: %s", entry.transaction, error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if not isinstance(answer, peer_messages.OutcomeIs):
                return
            if (
                answer.state in (State.RESUMED, State.ENDED)
                and answer.boot_id == entry.peer_boot_id
            ):
                self._conclude(entry, resumed=True)
                return
            if answer.state == State.ABORTED or answer.boot_id != entry.peer_boot_id:
                self._conclude(entry, resumed=False)
                return
            await asyncio.sleep(RETRY_SECONDS)

    def _conclude(self, entry: Entry, *, resumed: bool) -> None:
        log.info(
            "%s: settled: %s", entry.transaction, "resumed there" if resumed else "aborted there"
        )
        driver = self.agents.find("guard" if entry.origin_cgroup else "keeper", entry.guest)
        if driver is not None:
            driver.link.send(Verdict(resumed))
        elif not entry.origin_cgroup:
            state = State.RESUMED if resumed else State.ABORTED
            self._journal.move(entry.transaction, Side.SOURCE, state, after=State.COMMITTED)
        elif not resumed:
            if self._journal.move(
                entry.transaction, Side.SOURCE, State.ABORTED, after=State.COMMITTED
            ):
                put_back(
                    Cgroup(guest_path("guard", entry.guest, "tree")), Path(entry.origin_cgroup)
                )
                clean_up("guard", entry.guest)
        else:
            self._guard_lost(entry)

    # ------------------------------------------------------------------ peers

    async def answer(self, peer: str, payload: bytes) -> bytes:
        """A question of another migd. Raises MigrateError, which is told to it."""
        try:
            question = peer_messages.decode_question(payload)
        except MALFORMED as error:
            raise PeerError(
                "question", f"makes no sense here ({error})", "use the same version"
            ) from None
        match question:
            case peer_messages.AskLoad():
                load = load_per_processor()
                return peer_messages.encode(peer_messages.Load(load, self._config.accept_guests))
            case peer_messages.MakeOffer(offer):
                return peer_messages.encode(self._take_in(offer, peer))
            case peer_messages.AskOutcome(transaction):
                entry = self._journal.find(transaction, Side.DESTINATION)
                state = entry.state if entry is not None and entry.peer == peer else ""
                return peer_messages.encode(peer_messages.OutcomeIs(str(state), self._boot_id))
            case peer_messages.AskGuest(guest):
                keeper = self.agents.find("keeper", guest)
                mine = keeper is not None and keeper.offer is not None and keeper.offer.home == peer
                return peer_messages.encode(peer_messages.GuestIs(mine))
            case peer_messages.AskHome(guest):
                wanted = self.agents.find("guard", guest) is not None
                return peer_messages.encode(peer_messages.HomeIs(wanted, self._boot_id))
            case peer_messages.DropGuest(guest):
                keeper = self.agents.find("keeper", guest)
                mine = keeper is not None and keeper.offer is not None and keeper.offer.home == peer
                if mine:
                    self.end_guest(guest, "home has given it up")
                return peer_messages.encode(peer_messages.GuestIs(False))
            case peer_messages.MoveGuest(guest, destination):
                keeper = self.agents.find("keeper", guest)
                if keeper is None or keeper.offer is None or keeper.offer.home != peer:
                    raise PeerError(f"guest {guest}", "is not here", "look with `migctl ps`")
                return peer_messages.encode(
                    await self._hop(guest, self._config.host_named(destination))
                )
            case peer_messages.ConnectGuest(guest, host):
                where = [
                    e.peer
                    for e in self._journal.in_state(State.RESUMED)
                    if e.guest == guest and e.side is Side.SOURCE and e.origin_cgroup
                ]
                if where != [peer]:
                    raise PeerError(f"guest {guest}", f"does not run on {peer}")
                self._config.host_named(host)
                await self._connect_guest(guest, host)
                return peer_messages.encode(peer_messages.Connected())
            case _:
                raise PeerError("question", "is not answered here", "use the same version")

    def _take_in(self, offer: Offer, peer: str) -> peer_messages.Accepted:
        judge(offer, peer, self._config, self._criu_version)
        if not offer.guest.replace("-", "").isalnum() or not offer.transaction.isalnum():
            raise PeerError("offer", "its names are malformed")
        if self.agents.find("keeper", offer.guest) is not None:
            raise PeerError(f"host {self._config.name}", "that guest is here already")
        self._journal.record(Entry.begin(offer, Side.DESTINATION, peer))
        place = "local" if offer.home == self._config.name else "remote"
        agent = self.agents.start("keeper", offer.guest, offer, place)
        agent.link.socket.send(msgspec.msgpack.encode(offer))
        log.info("%s: offer of %s from %s accepted", offer.transaction, offer.guest, peer)
        return peer_messages.Accepted(self._boot_id)

    async def incoming(self, connection: IncomingConnection) -> None:
        """A raw connection of a peer: to the keeper that it names."""
        try:
            agent = self.agents.find("keeper", connection.token)
            if agent is None or agent.offer is None:
                log.info(
                    "host %s: asks for %s, which is not here", connection.peer, connection.token
                )
                return
            wanted = agent.offer.source if connection.purpose == "bulk" else agent.offer.home
            if connection.peer != wanted:
                log.warning("host %s: may not reach %s", connection.peer, connection.token)
                return
            fds = (connection.fd_in, connection.fd_out, connection.fd_hold)
            agent.link.send(Attach(connection.purpose, connection.peer), fds)
        finally:
            connection.close()

    # ------------------------------------------------------------------ administration

    def list_guests(self, caller_uid: int) -> messages.Guests:
        """What `migctl ps` shows: to root everything, to others what is theirs."""
        rows = []
        for entry in self._journal.in_state(
            State.BEGUN, State.COMMITTED, State.OFFERED, State.RESUMED
        ):
            if caller_uid not in (0, entry.uid) or entry.boot_id != self._boot_id:
                continue
            if entry.side is Side.SOURCE and not entry.origin_cgroup:
                continue  # a hop: its home lists it
            if entry.side is Side.DESTINATION and entry.home == self._config.name:
                continue  # home again: the row of its first migration says so
            where = entry.peer if entry.side is Side.SOURCE else self._config.name
            state = {
                State.BEGUN: "leaving",
                State.COMMITTED: "in doubt",
                State.OFFERED: "arriving",
                State.RESUMED: self._whereabouts(entry),
            }[entry.state]
            rows.append(
                messages.GuestRow(
                    entry.pid, entry.user, entry.home, where, entry.since, state, entry.command
                )
            )
        return messages.Guests(tuple(rows))

    def _whereabouts(self, entry: Entry) -> str:
        if entry.side is Side.DESTINATION:
            return "guest"
        return "home" if entry.peer == self._config.name else "away"

    async def recover(self, request: messages.Recover) -> messages.Recovered:
        """Settle transactions in doubt, and say how."""
        lines = []
        for entry in self._journal.in_state(State.COMMITTED):
            if entry.side is not Side.SOURCE:
                continue
            if entry.peer == request.lost_host:
                self._conclude(entry, resumed=False)
                lines.append(f"{entry.transaction}: pid {entry.pid} runs here again")
                continue
            try:
                async with asyncio.timeout(OFFER_SECONDS):
                    await self._settle(entry)
                lines.append(f"{entry.transaction}: pid {entry.pid} settled with {entry.peer}")
            except TimeoutError:
                lines.append(
                    f"{entry.transaction}: pid {entry.pid} waits for {entry.peer}, which does not answer;"
                    f" if it will never come back: migctl recover --lost {entry.peer}"
                )
        return messages.Recovered(tuple(lines))

    def end_guest(self, guest: str, reason: str) -> None:
        """Kill a guest that runs here."""
        keeper = self.agents.find("keeper", guest)
        if keeper is not None:
            keeper.link.send(EndGuest(reason))


def _host_pid(offer: Offer) -> int:
    """The pid on this host of the root of a guest that runs here."""
    for pid in Cgroup(guest_path("keeper", offer.guest, "tree")).pids():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("NSpid:") and int(line.split()[-1]) == offer.ids.pid:
                    return pid
    raise HostError(f"guest {offer.guest}", "is not here any more", "look with `migctl ps`")


async def _tell_nobody(progress: messages.Progress) -> None:
    """Progress of a hop is not passed on yet."""
