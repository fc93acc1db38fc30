"""Two hosts talk: through the real bridge, over an SSH server in this process or none at all."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import paramiko
import pytest

import agent.bridge
from agent.control_frame import MAX_PAYLOAD_BYTES
from agent.peer_control import ControlConnection
from agent.peer_dial import connect_tcp
from agent.peer_errors import one_line
from agent.peer_hello import (
    PROTOCOL,
    Hello,
    Purpose,
    Refusal,
    check_answer,
    check_caller,
    decode_word,
    encode_word,
)
from agent.peer_raw import explain_ssh, ssh_command
from agent.peers import (
    AnswerLost,
    Bounds,
    Identity,
    IncomingConnection,
    Patience,
    PeerServer,
    PeerUnreachable,
    RawConnection,
    RawPool,
)
from migrate import paths, reaching
from migrate.config import Host
from migrate.errors import HostError, PeerError, UserError
from migrate.framing import FrameTooLarge, encode_frame, recv_frame, send_frame

pytestmark = pytest.mark.timeout(30)

NODE1 = Hello(PROTOCOL, "node1", "boot-1")
NODE2 = Hello(PROTOCOL, "node2", "boot-2")
BOUNDS = Bounds()
PEER = Host("node2", 2, "192.0.2.2")
QUICK = Patience(
    connect_seconds=5, ping_after_seconds=0.1, answer_seconds=0.3, retry_after_seconds=0.0
)


def bridge_command(socket_path: Path, node: str = "node1") -> list[str]:
    """What sshd runs by force."""
    return [sys.executable, "-I", "-S", agent.bridge.__file__, node, str(socket_path)]


async def echo(peer: str, payload: bytes) -> bytes:
    return peer.encode() + b":" + payload


class Node2:
    """The called host: its peer server, and the raw connections that have come."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "peer.sock"
        self.incoming: asyncio.Queue[IncomingConnection] = asyncio.Queue()
        self.serve: Callable[[str, bytes], Awaitable[bytes]] = echo
        self.known = {"node1"}
        self.server = self.make_server()

    def make_server(
        self, hello: Hello = NODE2, bounds: Bounds = BOUNDS, uids: frozenset[int] | None = None
    ) -> PeerServer:
        async def serve(peer: str, payload: bytes) -> bytes:
            return await self.serve(peer, payload)

        return PeerServer(
            hello,
            self.known.__contains__,
            serve,
            self.incoming.put,
            path=self.path,
            allowed_uids=uids if uids is not None else frozenset({os.getuid()}),
            bounds=bounds,
        )

    def pool(
        self, node: str = "node1", hello: Hello = NODE1, patience: Patience = QUICK
    ) -> RawPool:
        return RawPool(
            hello, patience=patience, command=lambda host, identity: bridge_command(self.path, node)
        )


@contextlib.asynccontextmanager
async def serving(node: Node2, server: PeerServer | None = None) -> AsyncIterator[Node2]:
    node.server = server or node.server
    node.server.start()
    try:
        yield node
    finally:
        await node.server.aclose()
        while not node.incoming.empty():
            node.incoming.get_nowait().close()


@contextlib.asynccontextmanager
async def closing(pool: RawPool) -> AsyncIterator[RawPool]:
    try:
        yield pool
    finally:
        await pool.aclose()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- the bridge ---


def test_the_bridge_knows_the_socket_by_the_same_path() -> None:
    assert str(paths.PEER_SOCKET) == agent.bridge.PEER_SOCKET
    assert reaching.RESTART_SECONDS == agent.bridge.RESTART_SECONDS


def test_without_migd_the_bridge_says_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        bridge_command(tmp_path / "none"), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "migrate: migd is not running: No such file or directory\n"


def test_the_bridge_hands_its_stdio_over_and_ends_with_the_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, ours:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with theirs:
            bridge = subprocess.Popen(bridge_command(tmp_path / "s"), stdin=theirs, stdout=theirs)
        with bridge:
            hold, _ = listener.accept()
            name, fds, _, _ = socket.recv_fds(hold, 100, 2)
            assert name == b"node1"
            os.write(fds[1], b"from the holder")
            assert ours.recv(100) == b"from the holder"
            ours.sendall(b"to the holder")
            assert os.read(fds[0], 100) == b"to the holder"
            for fd in fds:
                os.close(fd)
            assert bridge.poll() is None
            hold.close()
            assert bridge.wait(5) == 0
        assert ours.recv(100) == b""


# --- greetings ---


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            encode_word(Hello(PROTOCOL + 1, "node2", "b")),
            f"protocol {PROTOCOL + 1}, this host {PROTOCOL}; upgrade migrate here",
        ),
        (
            encode_word(Hello(0, "node2", "b")),
            f"protocol 0, this host {PROTOCOL}; upgrade migrate there",
        ),
        (encode_word(Hello(PROTOCOL, "node3", "b")), "calls itself node3"),
        (encode_word(Refusal("not\nlisted", "join")), "host node2: not listed; join"),
        (encode_word(Refusal("\x1b[2Jred")), r"host node2: \[2Jred$"),
        (encode_word(Purpose("bulk")), "something else than a greeting"),
        (b"garbage", "makes no sense"),
        (b"", "makes no sense"),
    ],
)
def test_a_wrong_answer_is_told_from_every_other(answer: bytes, message: str) -> None:
    with pytest.raises(PeerUnreachable, match=message) as error:
        check_answer(answer, "node2")
    assert str(error.value).isprintable()


def test_a_greeting_with_more_fields_is_still_understood() -> None:
    raw = b"\x85\xa4type\xa5hello\xa8protocol\x02\xa4host\xa5node2\xa7boot_id\xa1b\xa3new\xc0"
    assert check_answer(raw, "node2") == Hello(2, "node2", "b")


def test_a_caller_must_be_the_host_its_key_belongs_to() -> None:
    with pytest.raises(PeerError, match="the host with its key calls itself node1"):
        check_caller(encode_word(NODE1), "node3", "node2")


def test_what_a_peer_says_is_one_short_printable_line() -> None:
    assert one_line("a\n\x1b[31mb\t\0c") == "a [31mb c"
    assert len(one_line("x" * 10_000)) == 200


# --- raw connections ---


def test_bytes_after_the_purpose_reach_whoever_holds_the_descriptors(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(Node2(tmp_path)) as node, closing(node.pool()) as pool:
            raw = await pool.open(PEER)
            raw.begin("bulk", "token-7")
            os.write(raw.fd_out, b"x" * 1000)
            got = await node.incoming.get()
            assert (got.peer, got.purpose, got.token) == ("node1", "bulk", "token-7")
            assert os.get_blocking(got.fd_in) and os.get_blocking(got.fd_out)
            assert os.read(got.fd_in, 5000) == b"x" * 1000
            os.write(got.fd_out, b"back")
            assert os.read(raw.fd_in, 100) == b"back"
            got.close()
            assert os.read(raw.fd_in, 100) == b""
            raw.close()

    asyncio.run(run())


def test_a_raw_connection_outlives_both_migds(tmp_path: Path) -> None:
    async def connect() -> tuple[int, int, IncomingConnection, subprocess.Popen[bytes]]:
        async with serving(Node2(tmp_path)) as node, closing(node.pool()) as pool:
            raw = await pool.take(PEER)
            raw.begin("lifeline", "t")
            fd_in, fd_out = os.dup(raw.fd_in), os.dup(raw.fd_out)
            raw.detach()
            return fd_in, fd_out, await node.incoming.get(), raw.process

    fd_in, fd_out, got, process = asyncio.run(connect())
    os.write(fd_out, b"still there")
    assert os.read(got.fd_in, 100) == b"still there"
    assert process.poll() is None
    got.close()
    assert os.read(fd_in, 100) == b""
    os.close(fd_in)
    os.close(fd_out)
    process.wait(5)


def test_connections_from_before_a_loss_are_not_used(tmp_path: Path) -> None:
    """ssh does not know for a long time that the host at its other end has been switched off."""

    async def run() -> None:
        async with serving(Node2(tmp_path)) as node, closing(node.pool()) as pool:
            taken = await pool.take(PEER)
            while not pool._spares.get(PEER):
                await asyncio.sleep(0)
            (spare,) = pool._spares[PEER]
            pool.distrust(PEER)
            assert spare.told_to_end
            fresh = await pool.trusted(taken)
            assert fresh is not taken
            assert taken.told_to_end
            assert await pool.trusted(fresh) is fresh
            fresh.close()

    asyncio.run(run())


def test_a_connection_that_breaks_in_use_is_not_one_never_made(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        async with closing(node.pool()) as pool:
            async with serving(node):
                raw = await pool.open(PEER)
            await asyncio.wait_for(raw.ended.wait(), 5)
            failure = raw.failure()
            assert isinstance(failure, AnswerLost)
            assert str(failure) == "host node2: the connection was lost"
            with pytest.raises(PeerUnreachable, match="the connection was lost"):
                raw.begin("bulk", "t")
            raw.close()

    asyncio.run(run())


def test_the_spare_is_given_out_and_replaced(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(Node2(tmp_path)) as node, closing(node.pool()) as pool:
            first = await pool.take(PEER)
            spare = await settled_spare(pool)
            second = await pool.take(PEER)
            assert second is spare
            assert await settled_spare(pool) is not spare
            second.begin("bulk", "2")
            assert (await node.incoming.get()).token == "2"
            first.close()
            second.close()

    asyncio.run(run())


async def settled_spare(pool: RawPool) -> RawConnection:
    await asyncio.gather(*pool._filling.values())
    (spare,) = pool._spares[PEER]
    return spare


def test_a_dead_spare_is_not_given_out(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        async with closing(node.pool()) as pool:
            async with serving(node):
                pool.prepare(PEER)
                spare = await settled_spare(pool)
            # The other migd is restarted.
            await asyncio.wait_for(spare.ended.wait(), 5)
            async with serving(node, node.make_server()):
                raw = await pool.take(PEER)
                assert raw is not spare
                raw.begin("bulk", "after")
                assert (await node.incoming.get()).token == "after"
                raw.close()

    asyncio.run(run())


def test_a_spare_that_nobody_takes_is_closed(tmp_path: Path) -> None:
    async def run() -> None:
        patience = Patience(spare_seconds=0.05)
        async with serving(Node2(tmp_path)) as node, closing(node.pool(patience=patience)) as pool:
            raw = await pool.open(PEER)
            pool._spares[PEER] = [raw]
            pool.prepare(PEER)
            await asyncio.wait_for(raw.ended.wait(), 5)
            assert not raw.alive()
            assert PEER not in pool._spares

    asyncio.run(run())


def test_nothing_is_left_open_or_running(tmp_path: Path) -> None:
    async def run() -> list[subprocess.Popen[bytes]]:
        async with serving(Node2(tmp_path)) as node, closing(node.pool()) as pool:
            raw = await pool.take(PEER)
            await settled_spare(pool)
            processes = [child.process for child in pool._children.values()]
            raw.begin("bulk", "t")
            (await node.incoming.get()).close()
            raw.close()
            return processes

    before = open_fds()
    processes = asyncio.run(run())
    assert len(processes) == 2
    for process in processes:
        process.wait(5)
    assert open_fds() == before


def test_a_peer_whose_migd_does_not_run(tmp_path: Path) -> None:
    async def run() -> None:
        async with closing(Node2(tmp_path).pool()) as pool:
            with pytest.raises(PeerUnreachable, match="migd is not running there; start it"):
                await pool.take(PEER)

    asyncio.run(run())


def test_a_peer_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        pool = RawPool(
            NODE1, patience=Patience(connect_seconds=0.2), command=lambda *_: ["/bin/sleep", "60"]
        )
        async with closing(pool):
            with pytest.raises(PeerUnreachable, match=r"no connection within 0\.2 s"):
                await pool.open(PEER)
            (child,) = pool._children.values()
            await asyncio.wait_for(child.ended.wait(), 5)

    asyncio.run(run())


def test_without_ssh_this_host_is_to_blame() -> None:
    async def run() -> None:
        async with closing(RawPool(NODE1, command=lambda *_: ["/nonexistent/ssh"])) as pool:
            with pytest.raises(HostError, match="ssh: cannot start: No such file"):
                await pool.open(PEER)

    before = open_fds()
    asyncio.run(run())
    assert open_fds() == before


@pytest.mark.parametrize(
    ("known_as", "hello", "message"),
    [
        ("node9", NODE1, "host node2 does not list node9; run `migctl join node9` there"),
        ("node1", Hello(PROTOCOL, "node3", "b"), "the host with its key calls itself node3"),
        (
            "node1",
            Hello(PROTOCOL + 1, "node1", "b"),
            f"node2 speaks protocol {PROTOCOL}, node1 protocol {PROTOCOL + 1}; "
            "upgrade migrate on node2",
        ),
    ],
)
def test_the_server_refuses_with_the_reason(
    tmp_path: Path, known_as: str, hello: Hello, message: str
) -> None:
    async def run() -> None:
        async with serving(Node2(tmp_path)) as node, closing(node.pool(known_as, hello)) as pool:
            with pytest.raises(PeerUnreachable, match=message):
                await pool.open(PEER)

    asyncio.run(run())


def test_the_server_takes_no_bridge_of_another_user(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        server = node.make_server(uids=frozenset({os.getuid() + 1}))
        async with serving(node, server), closing(node.pool()) as pool:
            with pytest.raises(PeerUnreachable):
                await pool.open(PEER)

    asyncio.run(run())


def test_the_socket_is_for_its_group_alone(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(Node2(tmp_path)) as node:
            assert node.path.stat().st_mode & 0o777 == 0o660

    asyncio.run(run())


def test_a_peer_cannot_hold_any_number_of_spares(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        server = node.make_server(bounds=Bounds(connections=2))
        async with serving(node, server), closing(node.pool()) as pool:
            held = [await pool.open(PEER) for _ in range(2)]
            with pytest.raises(PeerUnreachable, match="too many connections"):
                await pool.open(PEER)
            for raw in held:
                raw.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 64, b"SSH-2.0-x\r\n", encode_frame(b"garbage"), b"\0\0", b""]
)
def test_garbage_ends_its_own_connection_and_no_other(tmp_path: Path, garbage: bytes) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        server = node.make_server(bounds=Bounds(greeting_seconds=0.2))
        async with serving(node, server), closing(node.pool()) as pool:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    bridge = subprocess.Popen(
                        bridge_command(node.path), stdin=theirs, stdout=theirs
                    )
                ours.sendall(garbage)
                await asyncio.to_thread(drain, ours)
                assert await asyncio.to_thread(bridge.wait, 5) == 0
            raw = await pool.open(PEER)
            raw.close()

    asyncio.run(run())


def drain(sock: socket.socket) -> None:
    """Read to the end; a reset is one, too: the other side has not read all."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass


@pytest.mark.parametrize("fds", [0, 1, "file"])
def test_a_bridge_without_two_streams_is_dropped(tmp_path: Path, fds: int | str) -> None:
    async def run() -> None:
        async with serving(Node2(tmp_path)) as node:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
                open(tmp_path / "file", "w") as file,
            ):
                sock.connect(str(node.path))
                passed = [file.fileno()] * 2 if fds == "file" else [sock.fileno()] * int(fds)
                socket.send_fds(sock, [b"node1"], passed)
                assert await asyncio.to_thread(sock.recv, 10) == b""

    before = open_fds()
    asyncio.run(run())
    assert open_fds() == before


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (69, "migrate: migd is not running: x\n", "migd is not running there"),
        (127, "sh: 1: /opt/migrate/bin/python: not found\n", "migrate is not installed there"),
        (
            255,
            "No ED25519 host key is known for node2 and …\nHost key verification failed.\n",
            "not known",
        ),
        (255, "@@@\n@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\n", "another host key"),
        (255, "migrate@10.0.0.2: Permission denied (publickey).\n", "not accept this host's key"),
        (255, "ssh: connect to host 10.0.0.2 port 22: Connection refused\n", "connection refused"),
        (255, "ssh: connect to host 10.0.0.2 port 22: Connection timed out\n", "timed out"),
        (255, "kex_exchange_identification: read: Connection reset\n", "Connection reset"),
        (255, "ssh: Could not resolve hostname x: Name or service not known\n", "be resolved"),
        (255, "", "its sshd ended the connection at once; after failed attempts"),
        (None, "", "its sshd ended the connection at once"),
    ],
)
def test_what_ssh_prints_becomes_one_sentence(status: int | None, text: str, message: str) -> None:
    error = explain_ssh("node2", status, text)
    assert message in str(error)
    assert str(error).startswith("host node2: ")


def test_ssh_is_told_to_trust_nothing_but_our_files() -> None:
    command = ssh_command(PEER, Identity(Path("/k"), Path("/kh")))
    assert command[-2:] == ["192.0.2.2", "raw"]
    assert command[command.index("-F") + 1] == "none"
    for option in (
        "StrictHostKeyChecking=yes",
        "UserKnownHostsFile=/kh",
        "GlobalKnownHostsFile=/dev/null",
        "HostKeyAlias=node2",
        "IdentityAgent=none",
        "BatchMode=yes",
    ):
        assert command[command.index(option) - 1] == "-o"


# --- control connections, over an SSH server in this process ---


class SshServer(paramiko.ServerInterface):
    """What sshd does: checks the key, and runs the forced command whatever is asked."""

    def __init__(self, accepted: paramiko.PKey, command: list[str]) -> None:
        self.accepted = accepted
        self.command = command

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        good = username == "migrate" and key == self.accepted
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self.run, args=(channel,), daemon=True).start()
        return True

    def run(self, channel: paramiko.Channel) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    self.command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
                )

            def inward() -> None:
                with contextlib.suppress(OSError):
                    while data := channel.recv(65536):
                        ours.sendall(data)
                    ours.shutdown(socket.SHUT_WR)

            threading.Thread(target=inward, daemon=True).start()
            with process, contextlib.suppress(OSError, EOFError):
                # A reset is the end, too: the command has not read all.
                with contextlib.suppress(ConnectionResetError):
                    while data := ours.recv(65536):
                        channel.sendall(data)
                _, text = process.communicate()
                channel.sendall_stderr(text)
                channel.send_exit_status(process.returncode)
            with contextlib.suppress(OSError, EOFError):
                channel.close()


class Wire:
    """Node1's way to node2: keys, known hosts, and an SSH server behind each socket."""

    def __init__(self, directory: Path, node: Node2) -> None:
        self.node = node
        self.host_key = make_key(directory / "host_key")
        self.client_key = make_key(directory / "key")
        self.accepted = self.client_key
        self.known_hosts = directory / "known_hosts"
        self.trust("node2", self.host_key)
        self.identity = Identity(directory / "key", self.known_hosts)
        self.dialled = 0
        self.transports: list[paramiko.Transport] = []

    def trust(self, name: str, key: paramiko.PKey) -> None:
        self.known_hosts.write_text(f"{name} {key.get_name()} {key.get_base64()}\n")

    def connect(self, peer: Host, seconds: float) -> socket.socket:
        self.dialled += 1
        ours, theirs = socket.socketpair()
        transport = paramiko.Transport(theirs)
        self.transports.append(transport)
        transport.add_server_key(self.host_key)
        transport.start_server(threading.Event(), SshServer(self.accepted, self.command()))
        return ours

    def command(self) -> list[str]:
        return bridge_command(self.node.path)

    def cut(self) -> None:
        for transport in self.transports:
            transport.close()
        self.transports.clear()


def make_key(path: Path) -> paramiko.PKey:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return paramiko.Ed25519Key.from_private_key_file(str(path))


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path, Node2(tmp_path))
    yield made
    made.cut()


Talk = Callable[[ControlConnection], Awaitable[None]]


def talk(wire: Wire, script: Talk, *, serve: bool = True, patience: Patience = QUICK) -> None:
    async def run() -> None:
        control = ControlConnection(PEER, NODE1, wire.identity, patience, connect=wire.connect)
        async with contextlib.AsyncExitStack() as stack:
            if serve:
                await stack.enter_async_context(serving(wire.node))
            stack.callback(control.close)
            await script(control)

    asyncio.run(run())


def test_questions_are_answered_and_the_connection_is_kept(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        assert await control.request(b"one", 5) == b"node1:one"
        big = b"x" * (MAX_PAYLOAD_BYTES - 6)
        answers = await asyncio.gather(
            *(control.request(b"%d" % number, 5) for number in range(20)), control.request(big, 5)
        )
        assert answers == [b"node1:%d" % number for number in range(20)] + [b"node1:" + big]
        assert (await control.hello()).boot_id == "boot-2"

    talk(wire, script)
    assert wire.dialled == 1


def test_many_who_ask_at_once_share_one_connection(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        await asyncio.gather(*(control.request(b"x", 5) for _ in range(5)))

    talk(wire, script)
    assert wire.dialled == 1


def test_an_answer_overtakes_a_slow_one(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        release = asyncio.Event()

        async def serve(peer: str, payload: bytes) -> bytes:
            if payload == b"slow":
                await release.wait()
            return payload

        wire.node.serve = serve
        slow = asyncio.create_task(control.request(b"slow", 5))
        assert await control.request(b"fast", 5) == b"fast"
        assert not slow.done()
        release.set()
        assert await slow == b"slow"

    talk(wire, script)


def test_an_error_there_is_the_same_error_here(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        async def refuse(peer: str, payload: bytes) -> bytes:
            raise UserError("pid 7", "not yours", "ask root")

        async def fail(peer: str, payload: bytes) -> bytes:
            raise ZeroDivisionError

        wire.node.serve = refuse
        with pytest.raises(UserError, match=r"^pid 7: not yours; ask root$"):
            await control.request(b"", 5)
        wire.node.serve = fail
        with pytest.raises(HostError, match="host node2: internal error"):
            await control.request(b"", 5)
        wire.node.serve = echo
        assert await control.request(b"", 5) == b"node1:"

    talk(wire, script)


def test_an_idle_connection_is_kept_alive_by_pings(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        await control.request(b"", 5)
        # Three times as long as a dead peer is waited for.
        await asyncio.sleep(3 * (QUICK.ping_after_seconds + QUICK.answer_seconds))
        assert control.connected
        await control.request(b"", 5)

    talk(wire, script)
    assert wire.dialled == 1


def test_a_lost_connection_is_made_again(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        await control.request(b"", 5)
        wire.cut()
        while control.connected:
            await asyncio.sleep(0.01)
        assert await control.request(b"again", 5) == b"node1:again"

    talk(wire, script)
    assert wire.dialled == 2


def test_a_question_on_a_connection_that_breaks_may_have_been_acted_on(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        asked = asyncio.Event()

        async def never(peer: str, payload: bytes) -> bytes:
            asked.set()
            await asyncio.Event().wait()
            return b""

        wire.node.serve = never
        question = asyncio.create_task(control.request(b"", 20))
        await asked.wait()
        wire.cut()
        with pytest.raises(AnswerLost, match="host node2: the connection was lost"):
            await question

    talk(wire, script)


def test_a_question_too_long_unanswered_is_given_up_alone(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        async def never(peer: str, payload: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        await control.hello()
        wire.node.serve = never
        with pytest.raises(AnswerLost, match=r"no answer within 0\.1 s"):
            await control.request(b"", 0.1)
        wire.node.serve = echo
        assert await control.request(b"", 5) == b"node1:"

    talk(wire, script)
    assert wire.dialled == 1


def test_a_silent_peer_is_dead_within_the_limit(wire: Wire, tmp_path: Path) -> None:
    """A hung migd: it greets, and then says nothing more."""
    mute = tmp_path / "mute.py"
    hello = encode_frame(encode_word(NODE2))
    mute.write_text(f"import os, time\nos.write(1, {hello!r})\ntime.sleep(60)\n")
    wire.command = lambda: [sys.executable, "-I", "-S", str(mute)]  # type: ignore[method-assign]

    async def script(control: ControlConnection) -> None:
        loop = asyncio.get_running_loop()
        await control.hello()
        start = loop.time()
        with pytest.raises(AnswerLost, match="no sign of life"):
            await control.request(b"", 20)
        assert loop.time() - start < 5

    talk(wire, script, serve=False)


def test_a_payload_beyond_the_limit_is_not_sent(wire: Wire) -> None:
    async def script(control: ControlConnection) -> None:
        with pytest.raises(FrameTooLarge):
            await control.request(b"x" * (MAX_PAYLOAD_BYTES + 1), 5)

    talk(wire, script, serve=False)
    assert wire.dialled == 0


def refused(wire: Wire, message: str, *, serve: bool = True) -> None:
    async def script(control: ControlConnection) -> None:
        with pytest.raises(PeerUnreachable, match=message):
            await control.request(b"", 10)

    talk(wire, script, serve=serve)


def test_an_unknown_host_key_is_refused(wire: Wire) -> None:
    wire.trust("node3", wire.host_key)
    refused(wire, "host node2: its host key is not known; run `migctl join node2`")


def test_another_host_key_is_refused(wire: Wire) -> None:
    wire.trust("node2", wire.client_key)
    refused(wire, "host node2: it shows another host key than before; run `migctl join node2`")


def test_a_key_that_the_peer_does_not_know_is_told(wire: Wire) -> None:
    wire.accepted = wire.host_key
    refused(wire, "host node2: it does not accept this host's key; run `migctl join node2`")


def test_a_missing_migd_is_told(wire: Wire) -> None:
    refused(wire, "host node2: migd is not running there; start it", serve=False)


def test_another_version_is_told(wire: Wire) -> None:
    wire.node.server = wire.node.make_server(Hello(PROTOCOL + 1, "node2", "b"))
    refused(wire, f"it speaks protocol {PROTOCOL + 1}, this host {PROTOCOL}; upgrade migrate here")


def test_a_host_that_is_down_is_told(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        peer = Host("node2", 2, "127.0.0.1", unused.getsockname()[1])

        async def run() -> None:
            control = ControlConnection(peer, NODE1, Identity(tmp_path / "k", tmp_path / "h"))
            with pytest.raises(PeerUnreachable, match=r"at 127\.0\.0\.1 port .*refused"):
                await control.request(b"", 5)

        asyncio.run(run())


def test_a_name_that_does_not_resolve_is_told(tmp_path: Path) -> None:
    def connect(peer: Host, seconds: float) -> socket.socket:
        return connect_tcp(Host("node2", 2, "no such name"), seconds)

    async def run() -> None:
        control = ControlConnection(PEER, NODE1, connect=connect)
        with pytest.raises(PeerUnreachable, match="cannot be resolved; correct its address"):
            await control.request(b"", 5)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("closes", "message"), [(True, "ended the connection at once"), (False, "no answer within 0.3")]
)
def test_an_sshd_that_turns_us_away_is_not_one_that_is_silent(
    wire: Wire, closes: bool, message: str
) -> None:
    async def script(control: ControlConnection) -> None:
        with pytest.raises(PeerUnreachable, match=message):
            await control.request(b"", 10)

    ours, theirs = socket.socketpair()
    wire.connect = lambda peer, seconds: ours  # type: ignore[method-assign]
    with theirs:
        if closes:
            theirs.close()
        talk(wire, script, serve=False, patience=Patience(connect_seconds=0.3))


def test_without_its_key_this_host_is_to_blame(wire: Wire) -> None:
    wire.identity.key_file.unlink()

    async def script(control: ControlConnection) -> None:
        with pytest.raises(HostError, match="run `migctl setup`"):
            await control.request(b"", 5)

    talk(wire, script)


def test_who_asks_after_a_failure_gets_an_attempt_of_his_own(wire: Wire) -> None:
    wire.trust("node3", wire.host_key)

    async def script(control: ControlConnection) -> None:
        questions = [control.request(b"", 10) for _ in range(20)]
        told = await asyncio.gather(*questions, return_exceptions=True)
        assert all(isinstance(answer, PeerUnreachable) for answer in told)
        dialled = wire.dialled
        assert dialled <= 2  # an older one may have been under way
        wire.trust("node2", wire.host_key)
        assert await control.request(b"ping", 10)
        assert wire.dialled == dialled + 1

    talk(wire, script, patience=Patience(retry_after_seconds=0.1))


def control_client(node: Node2) -> contextlib.AbstractContextManager[socket.socket]:
    """A control connection by hand, greeted: for what our own client never sends."""

    @contextlib.contextmanager
    def make() -> Iterator[socket.socket]:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                bridge = subprocess.Popen(bridge_command(node.path), stdin=theirs, stdout=theirs)
            with bridge:
                ours.settimeout(10)
                send_frame(ours, encode_word(NODE1))
                assert isinstance(decode_word(recv_frame(ours) or b""), Hello)
                yield ours
                drain(ours)

    return make()


@pytest.mark.parametrize(
    "frames",
    [
        b"\xff\xff\xff\xff",
        encode_frame(b""),
        encode_frame(b"\x09\0\0\0\0"),
        encode_frame(b"\x02\0\0\0\x01answer to nothing"),
        b"",
    ],
)
def test_the_server_ends_a_control_connection_that_makes_no_sense(
    tmp_path: Path, frames: bytes
) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        server = node.make_server(bounds=Bounds(control_silence_seconds=0.3))

        def misbehave() -> None:
            with control_client(node) as sock:
                sock.sendall(frames)

        async with serving(node, server):
            await asyncio.to_thread(misbehave)

    asyncio.run(run())


def test_the_server_bounds_the_open_questions_of_a_connection(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node2(tmp_path)
        hold = asyncio.Event()

        async def serve(peer: str, payload: bytes) -> bytes:
            await hold.wait()
            return b""

        def ask() -> bytes:
            with control_client(node) as sock:
                for number in range(3):
                    send_frame(sock, bytes([1]) + number.to_bytes(4, "big"))
                answer = recv_frame(sock) or b""
                sock.shutdown(socket.SHUT_WR)
                return answer

        node.serve = serve
        async with serving(node, node.make_server(bounds=Bounds(requests=2))):
            answer = await asyncio.to_thread(ask)
            hold.set()
        assert answer[:5] == b"\x03\0\0\0\x02"
        assert b"too many requests" in answer

    asyncio.run(run())
