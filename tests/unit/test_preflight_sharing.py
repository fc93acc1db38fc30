"""Preflight names what a tree shares with processes that would stay behind, and who they are."""

from __future__ import annotations

import os
import pty
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helper_processes import HELPER_UID, Helper, helper, without

from criu_hooks.namespaces import Namespaces
from criu_hooks.obstacles import Obstacle
from criu_hooks.outside import Holder, same_open_file
from criu_hooks.preflight import examine
from criu_hooks.sockets import unix_sockets
from criu_hooks.tree import ProcessTree

HERE = Namespaces.of(os.getpid())
MYSELF = f"pid {os.getpid()} "


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, HELPER_UID, -1)
        yield Path(name)


def obstacles_of(pid: int) -> tuple[Obstacle, ...]:
    return examine(ProcessTree.capture(pid), HELPER_UID, expected_namespaces=HERE)


def only(it: Helper, fd: int) -> str:
    """The one obstacle, which is about this descriptor."""
    (obstacle,) = obstacles_of(it.pid)
    assert f", fd {fd} " in obstacle.subject
    return obstacle.reason


def keep(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def needs_kcmp() -> None:
    if not same_open_file(os.getpid(), 0, Holder(os.getpid(), 0)):
        pytest.skip(without("kcmp"))


def test_a_pipe_that_only_leads_in_or_out_can_be_served(stack: ExitStack) -> None:
    r, w = (keep(stack, fd) for fd in os.pipe())
    with helper("", keep=[r]) as it:
        assert obstacles_of(it.pid) == ()
    with helper("", keep=[w]) as it:
        assert obstacles_of(it.pid) == ()


def test_a_pipe_with_both_ends_inside_and_one_outside_can_not(stack: ExitStack) -> None:
    r, w = (keep(stack, fd) for fd in os.pipe())
    with helper("", keep=[r, w]) as it:
        (obstacle,) = obstacles_of(it.pid)
    assert f"pipe:[{os.fstat(r).st_ino}]" in obstacle.subject
    assert MYSELF in obstacle.reason


@pytest.mark.parametrize("mode", ["os.O_RDONLY | os.O_NONBLOCK", "os.O_RDWR"])
def test_a_named_pipe_moves_only_with_both_its_ends(
    stack: ExitStack, place: Path, mode: str
) -> None:
    os.mkfifo(place / "f", 0o666)
    os.chown(place / "f", HELPER_UID, -1)
    with helper(f"tell(os.open(sys.argv[1], {mode}))", place / "f") as it:
        alone = obstacles_of(it.pid)
        keep(stack, os.open(place / "f", os.O_RDWR))
        reason = only(it, it.numbers[0])
    assert len(alone) == (0 if mode == "os.O_RDWR" else 1)
    assert MYSELF in reason


def test_a_unix_connection_to_outside_names_the_peer(stack: ExitStack) -> None:
    mine, theirs = socket.socketpair()
    stack.enter_context(mine)
    with theirs, helper("", keep=[theirs.fileno()]) as it:
        fd = theirs.detach()
        os.close(fd)
        reason = only(it, fd)
    assert f"is connected to {MYSELF}" in reason


def test_a_unix_socket_pair_inside_moves_unless_somebody_outside_has_it_too(
    stack: ExitStack,
) -> None:
    a, b = socket.socketpair()
    with helper("", keep=[a.fileno(), b.fileno()]) as it:
        fds = a.detach(), b.detach()
        shared = obstacles_of(it.pid)
        for fd in fds:
            os.close(fd)
        assert obstacles_of(it.pid) == ()
    assert [MYSELF in o.reason and "too" in o.reason for o in shared] == [True, True]


def test_a_connection_whose_peer_has_closed_can_move() -> None:
    with helper("a, b = socket.socketpair(); b.close()") as it:
        assert obstacles_of(it.pid) == ()


def test_a_bound_unix_socket_is_named_with_its_path(place: Path) -> None:
    code = """
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1] + "/s"); s.listen()
d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); d.bind("\\0" + sys.argv[1])
c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1] + "/s"); p, _ = s.accept()
tell(s.fileno(), d.fileno())
"""
    with helper(code, place) as it:
        listening, datagram = obstacles_of(it.pid)
    assert f"is bound to {place}/s" in listening.reason
    assert f"is bound to @{place}" in datagram.reason


def test_a_datagram_socket_connected_to_a_service_names_it(stack: ExitStack, place: Path) -> None:
    service = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    service.bind(str(place / "log"))
    (place / "log").chmod(0o666)
    code = """
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(sys.argv[1]); tell(s.fileno())
"""
    with helper(code, place / "log") as it:
        reason = only(it, it.numbers[0])
    assert MYSELF in reason
    assert f"at {place}/log" in reason


def test_descriptors_on_their_way_through_a_socket_are_named() -> None:
    code = "a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0]); tell(b.fileno())"
    with helper(code) as it:
        if not ProcessTree.capture(it.pid).root.files[-1].info.descriptors_in_flight:
            pytest.skip(without("scm_fds in fdinfo"))
        assert "on their way" in only(it, it.numbers[0])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("s = socket.create_server(('127.0.0.1', 0))", "listens on 127.0.0.1:"),
        (
            "s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))",
            "uses 127.0.0.1:",
        ),
        (
            "s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('127.0.0.1', 9))",
            "is connected, 127.0.0.1:",
        ),
    ],
)
def test_an_address_of_this_host_is_named(code: str, reason: str) -> None:
    with helper(f"{code}; tell(s.fileno())") as it:
        assert only(it, it.numbers[0]).startswith(reason)


def test_a_tcp_connection_is_named_with_both_addresses(stack: ExitStack) -> None:
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = server.getsockname()[1]
    code = "s = socket.socket(); s.connect(('127.0.0.1', int(sys.argv[1]))); tell(s.fileno())"
    with helper(code, port) as it:
        assert f"to 127.0.0.1:{port} (tcp)" in only(it, it.numbers[0])


def test_multipath_tcp_is_named_with_the_way_to_turn_it_off() -> None:
    code = """
try: s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); tell(s.fileno())
except OSError: tell(-1)
"""
    with helper(code) as it:
        if it.numbers[0] < 0:
            pytest.skip(without("multipath TCP"))
        (obstacle,) = obstacles_of(it.pid)
    assert "MPTCP" in obstacle.reason
    assert "GODEBUG" in obstacle.remedy


@pytest.mark.parametrize("make", ["os.eventfd(0)", "(e := select.epoll()).fileno()"])
def test_state_shared_with_the_parent_is_named(make: str) -> None:
    needs_kcmp()
    code = f"v = {make}; tell(fork(lambda: None), v)"
    with helper(code) as it:
        child, fd = it.numbers
        assert obstacles_of(it.pid) == ()
        (obstacle,) = obstacles_of(child)
    assert f"pid {it.pid} " in obstacle.reason
    assert f", fd {fd} " in obstacle.subject


def test_others_of_the_same_kind_are_no_sharing(stack: ExitStack) -> None:
    keep(stack, os.eventfd(0))
    with helper("v = os.eventfd(0)") as it:
        assert obstacles_of(it.pid) == ()


@pytest.mark.parametrize(
    "code",
    [
        "m = mmap.mmap(-1, 4096); tell(fork(lambda: None))",
        "f = os.memfd_create('m'); os.truncate(f, 4096); m = mmap.mmap(f, 4096); os.close(f); "
        "tell(fork(lambda: None))",
        "f = open(sys.argv[1] + '/s', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); "
        "tell(fork(lambda: None))",
    ],
)
def test_memory_shared_with_the_parent_is_named(place: Path, code: str) -> None:
    with helper(code, place) as it:
        (child,) = it.numbers
        whole = obstacles_of(it.pid)
        found = obstacles_of(child)
    assert whole == ()
    assert f"is memory shared with pid {it.pid} " in " ".join(o.reason for o in found)


def test_a_memfd_shared_with_the_parent_is_named() -> None:
    with helper("f = os.memfd_create('m'); tell(fork(lambda: None), f)") as it:
        (obstacle,) = obstacles_of(it.numbers[0])
    assert f"pid {it.pid} " in obstacle.reason


def test_memfds_of_the_same_name_are_no_sharing(stack: ExitStack) -> None:
    keep(stack, os.memfd_create("same"))
    with helper("f = os.memfd_create('same')") as it:
        assert obstacles_of(it.pid) == ()


@pytest.mark.parametrize(("mode", "refused"), [("w", True), ("r", False)])
def test_a_deleted_file_that_is_written_and_shared_is_named(
    place: Path, mode: str, refused: bool
) -> None:
    (place / "x").touch()
    (place / "x").chmod(0o666)
    code = f"""
f = open(sys.argv[1], "{mode}"); os.unlink(sys.argv[1]); tell(fork(lambda: None), f.fileno())
"""
    with helper(code, place / "x") as it:
        child, _ = it.numbers
        found = obstacles_of(child)
    assert [f"pid {it.pid} " in o.reason for o in found] == [True] * refused


def test_a_controlling_terminal_can_be_relayed_and_a_second_one_not(stack: ExitStack) -> None:
    code = """
fcntl.ioctl(int(sys.argv[1]), 0x540E, 0)  # TIOCSCTTY
t = os.open("/dev/tty", os.O_RDWR)
"""
    _, slave = (keep(stack, fd) for fd in pty.openpty())
    with helper(code, slave, keep=[slave]) as it:
        assert obstacles_of(it.pid) == ()
    _, second = (keep(stack, fd) for fd in pty.openpty())
    with helper(code, slave, keep=[slave, second]) as it:
        assert "second terminal" in only(it, second)


def test_who_serves_a_terminal_moves_only_with_its_users(stack: ExitStack) -> None:
    code = "m, s = pty.openpty(); tell(m, s)"
    with helper(code) as it:
        assert obstacles_of(it.pid) == ()
        master, slave = it.numbers
        keep(stack, os.open(f"/proc/{it.pid}/fd/{slave}", os.O_RDWR | os.O_NOCTTY))
        reason = only(it, master)
    assert MYSELF in reason


def test_unix_sockets_know_their_peers() -> None:
    a, b = socket.socketpair()
    with a, b:
        found = unix_sockets().get(os.fstat(a.fileno()).st_ino)
        assert found is not None
        assert found.peer == os.fstat(b.fileno()).st_ino
        assert not found.reachable
