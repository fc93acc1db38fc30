"""This host's way to the central daemon, whoever that is: finds it, follows it, or becomes it.

What clients here hold is remembered here, so that a new central daemon can be told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agent import load_checkpoint, load_leader
from agent import load_messages as words
from agent.load_central import Central, Item, failure
from agent.load_database import Session
from agent.load_leader import Follow, Lead, Standing
from agent.load_report import Report
from agent.peers import Peers
from migrate import mig_messages as mig
from migrate import paths
from migrate.config import Config, Host
from migrate.errors import HostError, MigrateError, PeerError
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0
"""A candidate that does not answer within it counts as unreachable."""
WATCH_SECONDS = 1.0
"""How often the one that leads and the other candidates look at each other."""
GRACE_SECONDS = 2.0
"""At its start, a candidate gives those before it so long to start as well."""
CALL_SECONDS = 3.0
PATIENCE_SECONDS = 12.0
"""How long a client waits for a central daemon when there is none."""
CALLS_AT_ONCE = 48
"""Less than agent.peer_server.Bounds.requests."""

Deliver = Callable[[mig.Event], None]


@dataclass(eq=False, slots=True)
class Client:
    """A client on this host."""

    number: int
    uid: int
    deliver: Deliver
    held: list[mig.Held] = field(default_factory=list)

    def note(self, request: mig.Request, reply: mig.Reply) -> None:
        """Keep what it holds by what was answered."""
        match request, reply:
            case mig.RequestHosts(_, priority, agent), mig.Granted(hosts):
                self.held += [mig.Held(host, priority, agent) for host in hosts]
            case mig.ReturnHosts(hosts, all_of_them), mig.Done():
                if all_of_them:
                    self.held.clear()
                for host in hosts:
                    self.drop(host)
            case mig.Open(_, held), mig.Opened(_, lost):
                self.held = list(held)
                for claim in lost:
                    self.held.remove(claim)
            case _:
                pass

    def drop(self, host: str) -> None:
        """One claim on this host has ended."""
        for claim in self.held:
            if claim.host == host:
                self.held.remove(claim)
                return


class LoadMember:
    """For the running loop, from `start` to `close`."""

    def __init__(
        self,
        config: Callable[[], Config],
        peers: Peers,
        report: Callable[[], Report],
        evict: Callable[[int | None, str], int],
        checkpoint: Path = paths.LOAD_CHECKPOINT,
    ) -> None:
        """:param evict: sends a user's guests away from here, for a reason."""
        self._config = config
        self._peers = peers
        self._report = report
        self._evict = evict
        self._checkpoint = checkpoint
        self._term = 0
        self.central: Central | None = None
        """while this host leads"""
        self._leader: Host | None = None
        """whom this host follows"""
        self._found = asyncio.Event()
        """set while there is a central daemon to ask"""
        self._lost = asyncio.Event()
        """set to have the central daemon looked for again"""
        self._changed = asyncio.Event()
        """set when there is something to report"""
        self._clients: dict[int, Client] = {}
        self._numbers = 0
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Look for the central daemon."""
        self._saved = load_checkpoint.load(self._checkpoint)
        self._term = self._saved.term
        self._spawn(self._run())

    def close(self) -> None:
        """Stop; the central daemon notices by the connection."""
        for task in self._tasks:
            task.cancel()
        if self.central is not None:
            self.central.close()
            self.central = None

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except MigrateError as error:
                log.info("load database: %s", error)
            except Exception:
                log.exception("load database: a task failed")

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------ whom to follow

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        patient_until = loop.time() + GRACE_SECONDS
        while True:
            config = self._config()
            answers = await self._ask_candidates(config)
            own = Standing(self.central is not None, self._term)
            self._term = max([self._term, *(answer.term for answer in answers.values())])
            names = [host.name for host in config.candidates]
            match load_leader.decide(config.name, own, names, answers):
                case Follow(name):
                    self._step_down()
                    await self._follow(config.host_named(name))
                    patient_until = 0.0
                    continue
                case Lead(term) if self.central is None:
                    if names[0] == config.name or loop.time() >= patient_until:
                        self._take_over(config, term)
                case _:
                    pass
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._lost.wait()
            self._lost.clear()

    async def _ask_candidates(self, config: Config) -> dict[str, Standing]:
        """What the other candidates say. If we do not lead, the first that does is enough."""
        answers: dict[str, Standing] = {}

        async def ask(host: Host) -> bool:
            with suppress(MigrateError):
                answer = await self._ask(host, words.AskStanding(self._term), ASK_SECONDS)
                if isinstance(answer, words.StandingIs):
                    answers[host.name] = Standing(answer.leads, answer.term)
                    return answer.leads
            return False

        others = [host for host in config.candidates if host.name != config.name]
        tasks = [asyncio.create_task(ask(host)) for host in others]
        try:
            for done in asyncio.as_completed(tasks):
                if await done and self.central is None:
                    break
        finally:
            for task in tasks:
                task.cancel()
        return answers

    def _take_over(self, config: Config, term: int) -> None:
        self._term = term
        self.central = Central(config, term, self._take, self._checkpoint)
        self.central.start(self._saved.hosts)
        lost = self.central.attach(config.name, self._attachment()).lost
        self._tell_lost(lost)
        self._found.set()
        self._spawn(self._report_here(self.central))

    async def _report_here(self, central: Central) -> None:
        """This host's own reports, while it leads."""
        while self.central is central:
            self.report_soon()
            await asyncio.sleep(self._config().report_seconds)

    def _step_down(self) -> None:
        if self.central is not None:
            self._found.clear()
            self.central.close()
            self.central = None
            self._saved = load_checkpoint.load(self._checkpoint)

    def _attachment(self) -> words.AttachHost:
        clients = tuple(
            words.ClientHolds(client.number, client.uid, tuple(client.held))
            for client in self._clients.values()
        )
        return words.AttachHost(self._report(), clients)

    def configure(self) -> None:
        """The configuration was read again."""
        if self.central is not None:
            self.central.configure(self._config())
        self._lost.set()

    # ------------------------------------------------------------------ following

    async def _follow(self, leader: Host) -> None:
        """Report and listen, until the central daemon is lost or another."""
        try:
            answer = await self._ask(leader, self._attachment(), ASK_SECONDS)
        except MigrateError as error:
            log.info("load database: %s", error)
            await asyncio.sleep(WATCH_SECONDS / 2)
            return
        if not isinstance(answer, words.Attached):
            return
        self._term = max(self._term, answer.term)
        self._tell_lost(answer.lost)
        self._leader = leader
        self._lost.clear()
        self._found.set()
        log.info("%s is the central daemon (term %d)", leader.name, answer.term)
        duties = [
            asyncio.create_task(duty)
            for duty in (
                self._listen(leader),
                self._report_changes(leader),
                self._watch(leader),
                self._until_lost(),
            )
        ]
        try:
            done, _ = await asyncio.wait(duties, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leader = None
            self._found.clear()
            for duty in duties:
                duty.cancel()
        for duty in done:
            failed = duty.exception()
            if isinstance(failed, MigrateError):
                log.info("load database: %s", failed)
            elif failed is not None:
                log.error("load database: a duty failed", exc_info=failed)
        self._lost.clear()

    async def _until_lost(self) -> None:
        await self._lost.wait()

    async def _listen(self, leader: Host) -> None:
        while True:
            answer = await self._ask(leader, words.Listen(), words.LISTEN_SECONDS + 10.0)
            if not isinstance(answer, words.News):
                return
            for item in answer.items:
                self._take(item)

    async def _report_changes(self, leader: Host) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config().report_seconds):
                    await self._changed.wait()
            self._changed.clear()
            answer = await self._ask(leader, words.SendReport(self._report()), ASK_SECONDS * 2)
            if not isinstance(answer, words.Noted):
                return

    async def _watch(self, leader: Host) -> None:
        """Candidates notice soon when the central daemon hangs; others by their connection."""
        config = self._config()
        if config.this_host not in config.candidates:
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            answer = await self._ask(leader, words.AskStanding(self._term), ASK_SECONDS)
            if not isinstance(answer, words.StandingIs) or not answer.leads:
                return

    def report_soon(self) -> None:
        """This host's report has changed."""
        if self.central is not None:
            self.central.report(self._config().name, self._report())
        else:
            self._changed.set()

    def _take(self, item: Item) -> None:
        """The central daemon's news."""
        match item:
            case words.ForClient(number, event):
                client = self._clients.get(number)
                if client is not None:
                    if isinstance(event, mig.HostLost):
                        client.drop(event.host)
                    client.deliver(event)
            case words.EvictHere(uid, reason):
                self._evict(uid, reason)

    def _tell_lost(self, lost: tuple[words.ClientHolds, ...]) -> None:
        for missing in lost:
            client = self._clients.get(missing.number)
            for claim in missing.held if client is not None else ():
                assert client is not None
                client.drop(claim.host)
                client.deliver(mig.HostLost(claim.host, "a new central daemon gave it to another"))

    async def _ask(
        self, host: Host, question: words.LoadQuestion, seconds: float
    ) -> words.LoadAnswer:
        data = await self._peers.control(host).request(words.encode(question), seconds)
        try:
            answer: words.LoadAnswer = words.decode_answer(data)
            return answer
        except MALFORMED as error:
            raise PeerError(f"host {host.name}", f"its answer makes no sense ({error})") from None

    # ------------------------------------------------------------------ clients of this host

    def open(self, uid: int, deliver: Deliver) -> Client:
        """A client has come. :param deliver: takes its events."""
        self._numbers += 1
        client = Client(self._numbers, uid, deliver)
        self._clients[client.number] = client
        return client

    def call_now(self, client: Client, request: mig.Request) -> mig.Reply | None:
        """The reply, if it can be had without waiting: while this host leads."""
        if self.central is None:
            return None
        session = Session(self._config().name, client.number)
        reply = self.central.call(session, client.uid, request)
        client.note(request, reply)
        return reply

    async def call(self, client: Client, request: mig.Request) -> mig.Reply:
        """The reply, from wherever the central daemon is; waits while there is none."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        question = words.ClientCall(client.number, client.uid, request)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._found.wait()
            except TimeoutError:
                error = HostError("load database", "no central daemon can be reached", "try later")
                return failure(error)
            reply = self.call_now(client, request)
            if reply is not None:
                return reply
            leader = self._leader
            if leader is None:
                continue
            try:
                async with self._calls:
                    answer = await self._ask(leader, question, CALL_SECONDS)
            except MigrateError as error:
                log.info("load database: %s", error)
                answer = None
            if isinstance(answer, words.ClientAnswer):
                client.note(request, answer.reply)
                return answer.reply
            if self._leader is leader:
                self._found.clear()
                self._lost.set()

    def leave(self, client: Client) -> None:
        """A client has gone."""
        self._clients.pop(client.number, None)
        if self.central is not None:
            self.central.gone(Session(self._config().name, client.number))
        elif self._leader is not None:
            self._spawn(self._say_gone(self._leader, client.number))

    async def _say_gone(self, leader: Host, number: int) -> None:
        async with self._calls:
            await self._ask(leader, words.ClientGone(number), CALL_SECONDS)

    # ------------------------------------------------------------------ questions of peers

    def answer_now(self, peer: str, question: words.LoadQuestion) -> words.LoadAnswer | None:
        """The answer to a member or candidate; None if it takes time (Listen).

        :raises PeerError: its report makes no sense.
        """
        central = self.central
        if isinstance(question, words.AskStanding):
            if question.term > self._term and central is not None:
                self._lost.set()
            return words.StandingIs(central is not None, self._term)
        if central is None:
            return words.NotCentral()
        if isinstance(question, words.AttachHost):
            return central.attach(peer, question)
        if not central.knows(peer):
            return words.NotCentral()
        match question:
            case words.SendReport(report):
                central.report(peer, report)
                return words.Noted()
            case words.ClientCall(number, uid, request):
                return words.ClientAnswer(central.call(Session(peer, number), uid, request))
            case words.ClientGone(number):
                central.gone(Session(peer, number))
                return words.Noted()
            case _:
                return None

    async def answer(self, peer: str, question: words.LoadQuestion) -> words.LoadAnswer:
        """As `answer_now`, whatever it is."""
        answer = self.answer_now(peer, question)
        if answer is not None:
            return answer
        assert self.central is not None
        return await self.central.listen(peer) or words.NotCentral()

    def peer_gone(self, peer: str) -> None:
        """A peer's control connection has ended."""
        if self.central is not None:
            self.central.member_gone(peer)
