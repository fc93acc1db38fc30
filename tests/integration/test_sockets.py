"""Garbage, oversized and half messages on every socket: a line in the log, and nobody is harmed or leaks."""

import struct
from collections.abc import Iterator

import pytest
from moving import Desk, agent_pids, until

from agent.peer_hello import PROTOCOL

WRITE = """\
import subprocess, sys
from agent.peer_identity import DEFAULT_IDENTITY
from agent.peer_raw import ssh_command
from migrate.config import load_config

peer = load_config().host_named(sys.argv[1])
done = subprocess.run(
    ssh_command(peer, DEFAULT_IDENTITY), input=bytes.fromhex(sys.argv[2]), capture_output=True,
    timeout=30,
)
print(done.stdout.decode("latin-1"))
"""
TALK = """\
import array, os, socket, sys
kind = {"packet": socket.SOCK_SEQPACKET, "stream": socket.SOCK_STREAM}[sys.argv[1]]
sock = socket.socket(socket.AF_UNIX, kind)
sock.settimeout(20)
sock.connect(sys.argv[2])
canary = os.memfd_create("canary")
rights = array.array("i", [canary] * int(sys.argv[4]))
ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
try:
    sock.sendmsg([bytes(int(sys.argv[3][4:])) if sys.argv[3][:4] == "len " else bytes.fromhex(sys.argv[3])], ancillary)
    while sock.recv(65536):
        pass
    print("closed")
except (BrokenPipeError, ConnectionResetError):
    print("closed")
"""


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def hello(use: str) -> bytes:
    """node2's greeting."""
    words = {b"type": b"hello", b"host": b"node2", b"boot_id": b"b", b"use": use.encode()}
    text = b"".join(bytes([0xA0 + len(word)]) + word for pair in words.items() for word in pair)
    return frame(bytes([0x80 + len(words) + 1]) + text + b"\xa8protocol" + bytes([PROTOCOL]))


PEERS = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n" * 10,
    "an oversized frame": struct.pack(">I", 1 << 31) + b"x" * 1000,
    "a frame that is no greeting": frame(b"hello"),
    "half a greeting": hello("control")[:-5],
    "garbage after the greeting": hello("control") + b"\xff" * 1000,
    "an oversized question": hello("control") + struct.pack(">I", 1 << 30) + b"x" * 1000,
    "a frame of no known kind": hello("control") + frame(b"\x09\0\0\0\x01payload"),
    "half a question": hello("control") + struct.pack(">I", 500) + b"\x01\0\0\0\x01half",
    "no purpose": hello("raw") + frame(b"\xc0"),
}
PACKETS = {
    "garbage": ("ff" * 100, 0),
    "no packet at all, with descriptors": ("ff", 8),
    "an oversized packet": ("len 150000", 3),
    "more descriptors than any packet has": ("ff", 200),
    "a packet of another kind": ("81a474797065a568656c6c6f", 1),
}


def open_fds(desk: Desk, node: str, pid: int) -> int:
    return int(desk.nodes.sh(node, f"ls /proc/{pid}/fd | wc -l"))


def holds_canary(desk: Desk, node: str, pid: int) -> bool:
    """Whether it has kept a descriptor that TALK has passed."""
    return "/memfd:canary" in desk.nodes.sh(node, f"ls -l /proc/{pid}/fd")


def migd_pid(desk: Desk, node: str) -> int:
    return int(desk.nodes.sh(node, "pgrep -o -f '[b]in/migd'"))


@pytest.fixture
def guest(desk: Desk) -> Iterator[int]:
    """A guest of node1 on node2. Whatever was said on a socket, it goes on and ends well."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    yield pid
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


@pytest.mark.parametrize("what", PEERS)
def test_nonsense_of_a_peer_is_logged_and_leaks_nothing(desk: Desk, guest: int, what: str) -> None:
    migd = migd_pid(desk, "node1")
    python = "/opt/migrate/bin/python"
    before = open_fds(desk, "node1", migd)
    desk.nodes.crash_migd("node1")  # its next life has not said anything about node2 yet
    migd = migd_pid(desk, "node1")
    desk.nodes.exec("node2", [python, "-c", WRITE, "node1", PEERS[what].hex()])
    until(lambda: "host node2: connection ended: " in _last_life(desk), "a line in the log")
    until(lambda: open_fds(desk, "node1", migd) <= before, "nothing is left open")
    assert migd_pid(desk, "node1") == migd
    assert "Traceback" not in _last_life(desk)


def _last_life(desk: Desk) -> str:
    """What the migd that runs on node1 has logged."""
    return desk.nodes.logs("node1").rpartition(" is ready (CRIU")[2]


@pytest.mark.parametrize("what", PACKETS)
@pytest.mark.parametrize(("node", "role"), [("node1", "guard"), ("node2", "keeper")])
def test_nonsense_on_a_guards_or_keepers_socket_ends_that_connection_alone(
    desk: Desk, guest: int, node: str, role: str, what: str
) -> None:
    path = desk.nodes.sh(node, f"ls -d /run/migrate/guests/{role}-*/{role}.sock")
    before = {pid: open_fds(desk, node, pid) for pid in agent_pids(desk.nodes, node, role)}
    data, count = PACKETS[what]
    said = desk.nodes.exec(node, ["python3", "-c", TALK, "packet", path, data, str(count)])
    assert said.stdout == "closed\n"
    after = {pid: open_fds(desk, node, pid) for pid in agent_pids(desk.nodes, node, role)}
    assert after == before
    assert "a packet that makes no sense" in desk.nodes.logs(node)


def test_only_the_deputy_is_heard_on_its_socket(desk: Desk, guest: int) -> None:
    """Even its own user's other programs are not."""
    (guard,) = agent_pids(desk.nodes, "node1", "guard")
    (path,) = desk.nodes.sh("node1", "ls -d /run/migrate/deputies/*").splitlines()
    before = open_fds(desk, "node1", guard)
    command = ["python3", "-c", TALK, "stream", path, b"SIG 9\n".hex(), "0"]
    assert desk.nodes.exec("node1", command, user="alice").stdout == "closed\n"
    assert open_fds(desk, "node1", guard) == before
    told = desk.nodes.exec("node1", command, user="bob", check=False)
    assert "PermissionError" in told.stderr


def test_users_nonsense_is_logged_and_leaks_nothing(desk: Desk, guest: int) -> None:
    migd = migd_pid(desk, "node1")
    for data in (b"GET / HTTP/1.1\r\n", struct.pack(">I", 1 << 31), frame(b"hello")):
        command = ["python3", "-c", TALK, "stream", "/run/migrate/migd.sock", data.hex(), "2"]
        desk.nodes.exec("node1", command, user="bob")
    for packet, count in PACKETS.values():
        command = ["python3", "-c", TALK, "packet", "/run/migrate/run.sock", packet, str(count)]
        assert desk.nodes.exec("node1", command, user="bob").stdout == "closed\n"
    until(lambda: "uid 1002: " in desk.nodes.logs("node1"), "a line in the log")
    until(lambda: not holds_canary(desk, "node1", migd), "what was passed is closed")
    assert migd_pid(desk, "node1") == migd
    assert "Traceback" not in _last_life(desk)


@pytest.mark.parametrize("kind", ["agents", "workers"])
def test_who_forks_guards_and_criu_workers_does_so_for_root_alone_and_outlives_nonsense(
    desk: Desk, kind: str
) -> None:
    """It is there once something has moved."""
    path = f"/run/migrate/{kind}.sock"
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    (server,) = forkservers(desk, "node1", kind)
    for data, count in PACKETS.values():
        words = ["python3", "-c", TALK, "packet", path, data, str(count)]
        assert desk.nodes.exec("node1", words).stdout == "closed\n"
        told = desk.nodes.exec("node1", words, user="alice", check=False)
        assert "PermissionError" in told.stderr
    desk.move(pid, "node1")
    desk.move(pid, "node2")
    assert forkservers(desk, "node1", kind) == [server]
    assert not holds_canary(desk, "node1", int(server))
    assert "Traceback" not in _last_life(desk)
    desk.enough()
    assert shell.status() == 7


def forkservers(desk: Desk, node: str, kind: str) -> list[str]:
    """Their pids. What they have forked has another name."""
    return desk.nodes.sh(node, f"pgrep -f '[a]gent.forkserver {kind}'").split()
