"""The Mig library and migd's load socket, over a real socket: events, reconnecting, bad clients."""

import asyncio
import fcntl
import os
import pwd
import select
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent import load_clients
from agent import load_messages as words
from agent.activation import inherited_socket
from agent.load_clients import LoadClients
from agent.load_policy import Verdict
from agent.load_report import Report
from agent.load_service import LoadService
from agent.peer_hello import PROTOCOL, Hello
from agent.peers import Peers
from migrate import mig_messages as messages
from migrate.config import Config, Host
from migrate.errors import HostError, PeerError, UserError
from migrate.framing import FrameDecoder, encode_frame
from migrate.mig import MIG_PROC_AGENT, HostLost, HostState, Mig, MoreHosts, Priority

pytestmark = pytest.mark.timeout(60)

CONFIG = Config(
    hosts=tuple(Host(f"host{n}", n, f"192.0.2.{n}") for n in range(1, 5)),
    name="host1",
    central_candidates=("host1",),
    owners=("nobody",),
)


def report(idle: float = 99.0, verdict: Verdict = Verdict.ACCEPTS) -> Report:
    machine = os.uname().machine
    return Report(machine=machine, verdict=verdict, loads=(0, 0, 0), idle_seconds=idle)


class Host1:
    """A host that leads: its load service and its socket, in a loop of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "load.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.service: LoadService
        self.clients: LoadClients
        self.evicted: list[tuple[int | None, str]] = []

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def start(self) -> None:
        async def start() -> None:
            peers = Peers(Hello(PROTOCOL, "host1", "boot"))
            self.service = LoadService(
                lambda: CONFIG,
                peers,
                lambda: (),
                self._evict,
                state_dir=self.directory,
                run_dir=self.directory,
            )
            self.clients = LoadClients(self.service, self.path)
            await self.service.start()
            self.clients.start()
            while self.service.member.central is None:
                await asyncio.sleep(0.01)

        self.run(start())

    def stop(self) -> None:
        async def stop() -> None:
            self.clients.close()
            self.service.close()
            await asyncio.sleep(0)

        self.run(stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _evict(self, uid: int | None, reason: str) -> int:
        self.evicted.append((uid, reason))
        return 3

    def peer_says(self, peer: str, question: words.LoadQuestion) -> words.LoadAnswer:
        async def say() -> words.LoadAnswer:
            answer = self.service.member.answer_now(peer, question)
            assert answer is not None
            return answer

        answer: words.LoadAnswer = self.run(say())
        return answer

    def attach(self, peer: str, idle: float = 99.0) -> None:
        answer = self.peer_says(peer, words.AttachHost(report(idle)))
        assert isinstance(answer, words.Attached)


@pytest.fixture
def host1(tmp_path: Path) -> Iterator[Host1]:
    made = Host1(tmp_path)
    made.start()
    made.attach("host2", idle=200)
    made.attach("host3", idle=100)
    yield made
    made.close()


@pytest.fixture
def mig(host1: Host1) -> Iterator[Mig]:
    with Mig(host1.path) as made:
        yield made


def readable(mig: Mig, seconds: float = 20.0) -> bool:
    return bool(select.select([mig], [], [], seconds)[0])


def test_hosts_are_claimed_confirmed_and_returned(mig: Mig) -> None:
    assert mig.request_idle_hosts(5) == ["host2", "host3"]
    assert [claim.host for claim in mig.held] == ["host2", "host3"]
    assert mig.confirm_idle("host2") and not mig.confirm_idle("host4")
    assert mig.get_info("host2").state is HostState.FULL
    assert mig.return_hosts(["host2", "host4"]) == 1
    assert mig.return_hosts() == 1
    assert mig.held == ()
    assert mig.get_info("host2").state is HostState.IDLE


def test_information(mig: Mig) -> None:
    assert mig.get_info().name == "host1"
    assert mig.get_info(3).name == "host3"
    assert {h.name: h.state for h in mig.get_all_info()}["host4"] is HostState.DOWN
    with pytest.raises(UserError, match="not in the load database"):
        mig.get_info("host9")


def test_the_old_interface(mig: Mig) -> None:
    assert mig.get_idle_node() == 2
    assert mig.done(2) == 1
    mig.request_idle_hosts(2)
    assert mig.get_idle_node() == 0


def test_the_descriptor_is_readable_when_there_is_news_and_only_then(
    host1: Host1, mig: Mig
) -> None:
    mig.request_idle_hosts(1)
    assert not readable(mig, 0)
    host1.peer_says("host2", words.SendReport(report(verdict=Verdict.ACTIVE)))
    assert readable(mig)
    assert mig.events() == [HostLost("host2", "it takes no guests any more")]
    assert not readable(mig, 0)
    assert mig.held == ()


def test_news_that_came_with_an_answer_still_makes_it_readable(host1: Host1, mig: Mig) -> None:
    mig.request_idle_hosts(1)
    host1.peer_says("host2", words.SendReport(report(verdict=Verdict.ACTIVE)))
    assert mig.get_stats().lost == 1  # reads the event on its way to the answer
    assert readable(mig, 0)
    assert [type(event) for event in mig.events()] == [HostLost]


def test_the_callback_is_called_once_when_there_are_more_hosts(host1: Host1, mig: Mig) -> None:
    called = []
    assert len(mig.request_idle_hosts(3, callback=lambda: called.append(mig.held))) == 2
    host1.attach("host4")
    assert readable(mig)
    assert mig.events() == [MoreHosts()]
    assert len(called) == 1
    assert mig.request_idle_hosts(1) == ["host4"]


def test_a_restarted_daemon_is_told_what_is_held(host1: Host1, mig: Mig) -> None:
    assert mig.request_idle_hosts(2, Priority.LOW) == ["host2", "host3"]
    host1.stop()
    host1.start()
    host1.attach("host2")
    assert mig.confirm_idle("host2")
    assert mig.get_info("host2").claims == 1
    assert mig.events() == []


def test_what_cannot_be_had_again_is_told(host1: Host1, mig: Mig) -> None:
    assert mig.request_idle_hosts(1) == ["host2"]
    host1.stop()
    host1.start()
    host1.attach("host2")
    with Mig(host1.path) as other:
        assert other.request_idle_hosts(1) == ["host2"]
        assert not mig.confirm_idle("host2")
        assert readable(mig)
        assert [event.host for event in mig.events() if isinstance(event, HostLost)] == ["host2"]
        assert mig.held == ()


def test_without_a_daemon_the_error_says_how_to_start_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrate.mig.RECONNECT_SECONDS", 0.2)
    with Mig(tmp_path / "none") as mig, pytest.raises(HostError, match="systemctl start migd"):
        mig.get_info()


def test_claims_end_with_the_connection_but_an_agents(host1: Host1, mig: Mig) -> None:
    with Mig(host1.path) as other:
        other.request_idle_hosts(1)
        other.request_idle_hosts(1, flags=MIG_PROC_AGENT)
    while mig.get_info("host2").claims:
        pass
    assert mig.get_info("host3").claims == 1


def test_block_and_bring_and_evict(host1: Host1, mig: Mig) -> None:
    mig.command(messages.Block("backup"))
    assert mig.get_info().state is HostState.REFUSES
    assert (host1.directory / "blocked").read_text() == "backup\n"
    mig.command(messages.Bring())
    assert mig.get_info().state is not HostState.REFUSES
    assert mig.evict() == 3
    who = pwd.getpwuid(os.getuid()).pw_name
    assert host1.evicted == [(None, f"{who} asked for it")]
    assert mig.get_info().state is HostState.ACTIVE, "its owner is there"
    assert mig.command(messages.Expel("backup")) == 3
    assert host1.evicted[1:] == [(None, "backup")]
    assert mig.get_info().state is HostState.REFUSES
    assert mig.command(messages.AwaitGone()) == 0


def test_thresholds_that_contradict_each_other_are_refused(mig: Mig) -> None:
    with pytest.raises(HostError, match="above load_stop"):
        mig.command(messages.SetLimits(load_accept=(9, 9, 9)))


def test_a_daemon_that_a_client_has_started_answers_it(host1: Host1) -> None:
    """As systemd does it: the socket is there before migd is, and after."""
    path = host1.directory / "activated.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(lambda: Mig(path).get_info().name)
            assert select.select([listener], [], [], 20)[0], "the client has come"
            clients = LoadClients(host1.service, path, inherited=listener.dup())

            async def start() -> None:
                clients.start()

            host1.run(start())
            assert asked.result(20) == "host1"

            async def close() -> None:
                clients.close()

            host1.run(close())
        with socket.socket(socket.AF_UNIX) as next_one:
            next_one.connect(str(path))


def test_sockets_of_the_service_manager_are_found_by_name() -> None:
    first, second = socket.socketpair()
    with first, second:
        base = fcntl.fcntl(first, fcntl.F_DUPFD, 100)
        os.dup2(second.fileno(), base + 1)
        told = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": "2",
            "LISTEN_FDNAMES": "other:load",
        }
        found = inherited_socket("load", told, base)
        assert found is not None
        with found:
            assert found.fileno() == base + 1
            assert not found.get_inheritable()
        assert inherited_socket("third", told, base) is None
        assert inherited_socket("load", {**told, "LISTEN_PID": "1"}, base) is None
        assert inherited_socket("load", {}, base) is None
        os.close(base)


# ---------------------------------------------------------------------- bad clients and hosts


def connect(host1: Host1) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(host1.path))
    return sock


def say(sock: socket.socket, *requests: messages.Request) -> None:
    sock.sendall(b"".join(encode_frame(messages.encode(request)) for request in requests))


def hear(sock: socket.socket) -> messages.Answer:
    decoder = FrameDecoder()
    while not (frames := decoder.feed(sock.recv(1))):
        pass
    answer: messages.Answer = messages.decode_answer(frames[0])
    return answer


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff" * 8,
        encode_frame(b"\xc1"),
        encode_frame(messages.encode(messages.AskAll())),
        encode_frame(messages.encode(messages.Open(protocol=99))),
    ],
)
def test_who_makes_no_sense_is_told_so(host1: Host1, junk: bytes) -> None:
    with connect(host1) as sock:
        sock.sendall(junk)
        assert isinstance(hear(sock), messages.Failure)


def test_who_claims_and_never_reads_is_hung_up(
    host1: Host1, mig: Mig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_clients, "MAX_BACKLOG_BYTES", 10_000)
    with connect(host1) as sock:
        say(sock, messages.Open(), messages.RequestHosts(2))
        try:
            while True:
                say(sock, *[messages.AskAll()] * 100)
        except OSError:
            pass
    assert mig.request_idle_hosts(2) == ["host2", "host3"]


def test_who_says_nothing_is_hung_up(host1: Host1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_clients, "GREETING_SECONDS", 0.1)
    with connect(host1) as sock:
        assert sock.recv(1) == b""


def test_one_user_gets_so_many_connections(host1: Host1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_clients, "CONNECTIONS_PER_USER", 2)
    with connect(host1), connect(host1), connect(host1) as third:
        answer = hear(third)
        assert isinstance(answer, messages.Failure) and "too many connections" in answer.reason


def test_requests_are_answered_in_order_however_they_come(host1: Host1) -> None:
    asked: list[messages.Request] = [
        messages.Open(),
        *[messages.AskHost(id=1 + n % 4) for n in range(200)],
    ]
    decoder, answers = FrameDecoder(), list[messages.Answer]()
    with connect(host1) as sock:
        say(sock, *asked)
        while len(answers) < len(asked):
            answers += [messages.decode_answer(f) for f in decoder.feed(sock.recv(1 << 16))]
    ids = [answer.info.id for answer in answers if isinstance(answer, messages.HostIs)]
    assert ids == [1 + n % 4 for n in range(200)]


def test_a_host_speaks_for_itself_only(host1: Host1, mig: Mig) -> None:
    host1.peer_says("host3", words.SendReport(report(verdict=Verdict.REFUSES)))
    states = {host.name: host.state for host in mig.get_all_info()}
    assert (states["host2"], states["host3"]) == (HostState.IDLE, HostState.REFUSES)


def test_nonsense_from_a_host_is_logged_once_and_changes_nothing(
    host1: Host1, mig: Mig, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        with pytest.raises(PeerError, match="no number"):
            host1.peer_says("host2", words.SendReport(report(idle=float("nan"))))
    assert mig.get_info("host2").state is HostState.IDLE
    assert len([line for line in caplog.messages if "no number" in line]) == 1


def test_a_host_that_has_not_attached_itself_is_told_to(host1: Host1) -> None:
    answer = host1.peer_says("host4", words.SendReport(report()))
    assert isinstance(answer, words.NotCentral)
