"""Descriptors at the ends of a lifeline behave as if they were one and the same."""

import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import endpoints
from agent.endpoints import Duplex, End, FdSink, FdSource, MeteredSink, PeekSource, unread
from agent.lifeline import Lifeline
from agent.reactor import Reactor
from agent.wire import Receiver, Sender

WINDOW = 1 << 17
BULK = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))  # 1 MiB


class Link:
    """A guard and a keeper on one reactor, and the stream between them that is under test."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.ends: list[End] = []
        self.guard = Lifeline(reactor, "guest", leads=False, on_message=print, ping_seconds=0)
        self.keeper = Lifeline(reactor, "guest", leads=True, on_message=print, ping_seconds=0)
        self.here = self.guard.open(1, WINDOW)
        self.there = self.keeper.open(1, WINDOW)
        self.attach()

    @property
    def sender(self) -> Sender:
        return self.here.sender

    @property
    def receiver(self) -> Receiver:
        return self.there.receiver

    def attach(self) -> None:
        a, b = socket.socketpair()
        self.guard.attach(*[a.detach()] * 2)
        self.keeper.attach(*[b.detach()] * 2)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            self.reactor.turn(0.05)

    def quiet(self) -> None:
        """Turn until nothing happens any more; fails when something spins."""
        for _ in range(1000):
            begun = time.monotonic()
            self.reactor.turn(0.03)
            if time.monotonic() - begun >= 0.03:
                return
        pytest.fail("the reactor spins")

    def close(self) -> None:
        self.guard.detach()
        self.keeper.detach()


@pytest.fixture
def link() -> Iterator[Link]:
    with Reactor() as reactor:
        link = Link(reactor)
        yield link
        link.close()


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    before = sorted(Path("/proc/self/fd").iterdir())
    yield
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


class Collector:
    """Reads a descriptor of our own while the reactor turns."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self.data = bytearray()
        self.eof = False

    def __call__(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while not self.eof:
                piece = os.read(self.fd, 1 << 20)
                self.data += piece
                self.eof = not piece
        return self.eof


def feed(fd: int, data: bytes) -> Callable[[], None]:
    """Write `data` into a descriptor of our own, as much as goes at each call, then close it."""
    os.set_blocking(fd, False)
    left = [memoryview(data)]

    def step() -> None:
        with contextlib.suppress(BlockingIOError):
            while left:
                count = os.write(fd, left[0])
                left[0] = left[0][count:]
                if not left[0]:
                    left.clear()
                    os.close(fd)

    return step


# ---------------------------------------------------------------------- FdSource and FdSink


def test_everything_and_then_the_end_cross_from_pipe_to_pipe(link: Link) -> None:
    source, write_end = os.pipe()
    read_end, sink = os.pipe()
    FdSource(link.reactor, link.sender, source, on_end=link.ends.append)
    FdSink(link.reactor, link.receiver, sink, on_end=link.ends.append)
    step, collect = feed(write_end, BULK), Collector(read_end)

    def done() -> bool:
        step()
        return collect()

    link.until(done)
    link.until(lambda: link.sender.finished)
    os.close(read_end)
    assert collect.data == BULK
    assert link.ends == [End.FINISHED, End.FINISHED]


@pytest.mark.parametrize("kind", ["pipe", "socket", "pty"])
def test_flags_shared_with_other_processes_stay_as_they_are(link: Link, kind: str) -> None:
    if kind == "pipe":
        (source, far), (other, sink) = os.pipe(), os.pipe()
    elif kind == "socket":
        (source, far), (other, sink) = (
            [end.detach() for end in socket.socketpair()] for _ in range(2)
        )
    else:
        (far, source), (other, sink) = pty.openpty(), pty.openpty()
    shared = [os.dup(source), os.dup(sink)]
    before = [flags(fd) for fd in shared]
    in_, out = (
        FdSource(link.reactor, link.sender, source),
        FdSink(link.reactor, link.receiver, sink),
    )
    os.write(far, b"hello\n")
    link.until(lambda: link.sender.acked)
    os.set_blocking(other, False)
    assert os.read(other, 100).rstrip() == b"hello"
    assert [flags(fd) for fd in shared] == before
    assert not any(flag & os.O_NONBLOCK for flag in before)
    in_.close()
    out.close()
    for fd in (far, other, *shared):
        os.close(fd)


def test_a_writer_dies_of_sigpipe_when_the_far_reader_is_gone(link: Link) -> None:
    source, write_end = os.pipe()
    read_end, sink = os.pipe()
    FdSource(link.reactor, link.sender, source, on_end=link.ends.append)
    FdSink(link.reactor, link.receiver, sink, on_end=link.ends.append)
    with subprocess.Popen(["yes"], stdout=write_end) as yes:
        os.close(write_end)
        collect = Collector(read_end)
        link.until(lambda: collect() or len(collect.data) > 100_000)
        os.close(read_end)
        link.until(lambda: yes.poll() is not None)
    assert yes.returncode == -signal.SIGPIPE
    assert link.ends == [End.RESET, End.RESET]


def test_a_reader_that_leaves_is_noticed_before_anything_is_written(link: Link) -> None:
    source, write_end = os.pipe()
    read_end, sink = os.pipe()
    FdSource(link.reactor, link.sender, source, on_end=link.ends.append)
    FdSink(link.reactor, link.receiver, sink, on_end=link.ends.append)
    link.quiet()
    assert link.ends == []
    os.close(read_end)
    link.until(lambda: len(link.ends) == 2)
    with pytest.raises(BrokenPipeError):
        os.write(write_end, b"x")
    os.close(write_end)


def test_the_reader_of_a_named_fifo_may_leave_and_come_back(link: Link, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read_end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = FdSink(link.reactor, link.receiver, os.open(fifo, os.O_WRONLY), on_end=link.ends.append)
    os.close(read_end)
    link.quiet()
    assert link.ends == []
    read_end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    link.sender.write(b"welcome back")
    link.until(lambda: link.sender.acked == 12)
    assert os.read(read_end, 100) == b"welcome back"
    os.close(read_end)
    sink.close()


def test_a_reader_that_does_not_read_stops_the_writer_and_nothing_spins(link: Link) -> None:
    source, write_end = os.pipe()
    read_end, sink = os.pipe()
    FdSource(link.reactor, link.sender, source)
    FdSink(link.reactor, link.receiver, sink)
    step = feed(write_end, BULK)
    for _ in range(50):
        step()
        link.reactor.turn(0)
    link.quiet()
    assert link.sender.end - link.sender.acked == WINDOW
    assert link.sender.end < len(BULK) // 2
    collect = Collector(read_end)

    def done() -> bool:
        step()
        return collect()

    link.until(done)
    os.close(read_end)
    assert collect.data == BULK


def test_a_writer_that_leaves_while_there_is_no_room_does_not_make_it_spin(link: Link) -> None:
    source, write_end = os.pipe()
    endpoint = FdSource(link.reactor, link.sender, source)
    link.sender.write(bytes(link.sender.room))
    link.quiet()
    os.close(write_end)
    link.quiet()
    endpoint.close()


def test_a_pipe_that_cannot_be_opened_again_never_blocks_us(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints._Port, "_reopen", lambda self, mode: False)
    source, write_end = os.pipe()
    read_end, sink = os.pipe()
    FdSource(link.reactor, link.sender, source)
    FdSink(link.reactor, link.receiver, sink)
    step = feed(write_end, BULK)
    for _ in range(200):
        step()
        link.reactor.turn(0)  # would block for ever in the full pipe
    collect = Collector(read_end)

    def done() -> bool:
        step()
        return collect()

    link.until(done)
    os.close(read_end)
    assert collect.data == BULK


def test_files_that_cannot_be_waited_for_work_too(link: Link, tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(BULK)
    FdSource(link.reactor, link.sender, os.open(original, os.O_RDONLY))
    sink = os.open(copy, os.O_WRONLY | os.O_CREAT)
    FdSink(link.reactor, link.receiver, sink, on_end=link.ends.append)
    link.until(lambda: link.ends)
    assert copy.read_bytes() == BULK


def test_what_cannot_be_written_is_refused(link: Link) -> None:
    FdSink(link.reactor, link.receiver, os.open("/dev/full", os.O_WRONLY), on_end=link.ends.append)
    link.sender.write(b"x")
    link.until(lambda: link.sender.reset)
    assert link.ends == [End.RESET]
    assert link.sender.acked == 0


def test_a_hung_up_terminal_refuses_what_is_written_to_it(link: Link) -> None:
    master, slave = pty.openpty()
    FdSink(link.reactor, link.receiver, slave, on_end=link.ends.append)
    link.sender.write(b"x")
    link.until(lambda: link.sender.acked == 1)
    os.close(master)
    link.until(lambda: link.sender.reset)
    assert link.ends == [End.RESET]


def test_drain_takes_more_than_the_window(link: Link) -> None:
    source, write_end = os.pipe()
    endpoint = FdSource(link.reactor, link.sender, source, on_end=link.ends.append)
    link.sender.write(bytes(link.sender.room))
    os.write(write_end, b"left in the pipe")
    assert endpoint.drain() == 16
    assert link.sender.unacked().endswith(b"left in the pipe")
    os.close(write_end)
    endpoint.drain()
    assert link.ends == [End.FINISHED]


def test_a_closed_endpoint_leaves_the_stream_to_the_next_one(link: Link) -> None:
    read_end, sink = os.pipe()
    FdSink(link.reactor, link.receiver, sink).close()
    os.close(read_end)
    link.sender.write(b"for the next one")
    link.until(lambda: link.receiver.received)
    assert link.sender.acked == 0
    read_end, sink = os.pipe()
    endpoint = FdSink(link.reactor, link.receiver, sink)
    link.until(lambda: link.sender.acked == 16)
    assert os.read(read_end, 100) == b"for the next one"
    endpoint.close()
    os.close(read_end)


# ---------------------------------------------------------------------- PeekSource and MeteredSink


class Stdin:
    """Home's stdin pipe and the guest's, with the stream between them."""

    def __init__(self, link: Link, home: int) -> None:
        self.link = link
        self.home = os.dup(home)  # the user's shell has it too
        self.source = PeekSource(link.reactor, link.sender, home, on_end=link.ends.append)
        self.guest, write_end = os.pipe()
        self.sink = MeteredSink(link.reactor, link.receiver, write_end, on_end=link.ends.append)

    def run(self, script: str) -> bytes:
        """A guest with this stdin; its output after it has ended, and home knows what it took."""
        with subprocess.Popen(
            ["sh", "-c", script], stdin=self.guest, stdout=subprocess.PIPE
        ) as guest:
            self.link.until(lambda: guest.poll() is not None)
            assert guest.stdout is not None
            output = guest.stdout.read()
        offset = self.sink.settle()
        self.link.until(lambda: self.link.sender.acked >= offset)
        return output

    def close(self) -> None:
        self.source.close()
        self.sink.close()
        os.close(self.home)
        os.close(self.guest)


@pytest.fixture
def stdin(link: Link) -> Iterator[tuple[Stdin, list[int]]]:
    """A Stdin on a pipe, and the pipe's write end in a list (taken out when a test closes it)."""
    home, writer = os.pipe()
    stdin, writers = Stdin(link, home), [writer]
    yield stdin, writers
    stdin.close()
    for fd in writers:
        os.close(fd)


def test_what_the_guest_did_not_read_is_there_for_the_next_reader_at_home(
    stdin: tuple[Stdin, list[int]],
) -> None:
    pipe, writers = stdin
    before = flags(pipe.home)
    os.write(writers[0], b"one\ntwo\nthree\n")
    assert pipe.run("read x; echo got $x") == b"got one\n"
    assert flags(pipe.home) == before
    assert os.read(pipe.home, 100) == b"two\nthree\n"


def test_two_guests_after_each_other_share_a_stdin_as_in_a_loop(
    stdin: tuple[Stdin, list[int]],
) -> None:
    pipe, writers = stdin
    os.write(writers[0], b"abcdef")
    assert pipe.run("head -c1") == b"a"
    assert pipe.run("head -c2; sleep 0.01; head -c1") == b"bcd"
    assert os.read(pipe.home, 100) == b"ef"


def test_a_loop_in_a_real_shell_reads_line_by_line_around_its_guests(link: Link) -> None:
    """`while read x; do guest; done`, where home's shell reads between the guests."""
    home, writer = os.pipe()
    os.write(writer, b"x1\nguest one\nx2\nguest two\nx3\n")
    os.close(writer)
    seen: list[bytes] = []
    for number in (1, 2, 3):
        seen.append(subprocess.check_output(["sh", "-c", "read x; echo $x"], stdin=home))
        link.here, link.there = link.guard.open(9 + number), link.keeper.open(9 + number)
        pipe = Stdin(link, os.dup(home))
        seen.append(pipe.run("read x; echo $x"))
        pipe.close()
    os.close(home)
    assert seen == [b"x1\n", b"guest one\n", b"x2\n", b"guest two\n", b"x3\n", b"\n"]


def test_new_bytes_are_seen_behind_unread_ones(stdin: tuple[Stdin, list[int]]) -> None:
    pipe, writers = stdin
    for number in range(1, 4):
        os.write(writers[0], b"abc")
        while unread(pipe.guest) != 3 * number:
            pipe.link.reactor.turn(5)
    assert unread(pipe.home) == 9
    assert pipe.link.sender.acked == 0


def test_small_reads_of_the_guest_are_noticed_without_being_asked_for(
    stdin: tuple[Stdin, list[int]],
) -> None:
    pipe, writers = stdin
    os.write(writers[0], b"0123456789")
    pipe.link.until(lambda: unread(pipe.guest) == 10)
    assert os.read(pipe.guest, 3) == b"012"
    pipe.link.until(lambda: pipe.link.sender.acked == 3)
    assert unread(pipe.home) == 7
    time.sleep(0.2)  # the pauses of the meter have grown meanwhile
    os.read(pipe.guest, 1)
    pipe.link.until(lambda: unread(pipe.home) == 6)


def test_a_full_pipe_goes_on_as_the_guest_reads(stdin: tuple[Stdin, list[int]]) -> None:
    pipe, writers = stdin
    step, collect = feed(writers.pop(), BULK), Collector(pipe.guest)

    def done() -> bool:
        step()
        assert unread(pipe.home) <= 1 << 16
        return collect()

    pipe.link.until(done)
    assert collect.data == BULK
    pipe.link.until(lambda: len(pipe.link.ends) == 2)
    assert pipe.link.ends == [End.FINISHED, End.FINISHED]
    assert unread(pipe.home) == 0


def test_the_end_of_a_pipe_that_holds_more_than_the_window_comes_after_all_of_it(
    link: Link,
) -> None:
    home, writer = os.pipe()
    size = fcntl.fcntl(home, fcntl.F_SETPIPE_SZ, 2 * WINDOW)  # more slots than a new pipe has
    pipe = Stdin(link, home)
    os.write(writer, BULK[:size])
    os.close(writer)
    link.until(lambda: link.sender.end == WINDOW)
    collect = Collector(pipe.guest)
    link.until(collect)
    assert collect.data == BULK[:size]
    link.until(lambda: len(link.ends) == 2)
    pipe.close()


def test_the_end_is_passed_on_while_bytes_lie_unread(stdin: tuple[Stdin, list[int]]) -> None:
    pipe, writers = stdin
    os.write(writers[0], b"abc")
    os.close(writers.pop())
    pipe.link.until(lambda: pipe.link.receiver.fin_at == 3)
    pipe.link.quiet()
    assert pipe.link.ends == []
    assert unread(pipe.home) == 3
    assert os.read(pipe.guest, 2) == b"ab"
    assert pipe.sink.settle() == 2
    pipe.link.until(lambda: unread(pipe.home) == 1)
    assert os.read(pipe.guest, 2) == b"c"
    assert os.read(pipe.guest, 2) == b""
    pipe.link.until(lambda: len(pipe.link.ends) == 2)
    assert unread(pipe.home) == 0


def test_an_end_without_any_bytes_is_passed_on(stdin: tuple[Stdin, list[int]]) -> None:
    pipe, writers = stdin
    pipe.link.quiet()
    os.close(writers.pop())
    pipe.link.until(lambda: len(pipe.link.ends) == 2)
    assert os.read(pipe.guest, 1) == b""


def test_a_guest_that_closes_its_stdin_leaves_the_rest_at_home(link: Link) -> None:
    home, writer = os.pipe()
    source = PeekSource(link.reactor, link.sender, home, on_end=link.ends.append)
    shared = os.dup(home)
    guest, write_end = os.pipe()
    sink = MeteredSink(link.reactor, link.receiver, write_end, on_end=link.ends.append)
    os.write(writer, b"0123456789")
    link.until(lambda: unread(guest) == 10)
    os.read(guest, 4)
    os.close(guest)
    link.until(lambda: len(link.ends) == 2)
    assert link.ends == [End.RESET, End.RESET]
    assert sink.settle() == 4
    assert os.read(shared, 100) == b"456789"
    os.close(shared)
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)
    source.close()


def test_a_socket_as_stdin_is_peeked_at_as_well(link: Link) -> None:
    home, writer = socket.socketpair()
    with writer:
        writer.send(b"one\n")
        pipe = Stdin(link, home.detach())
        before = flags(pipe.home)
        link.until(lambda: unread(pipe.guest) == 4)
        writer.send(b"two\nthree\n")
        link.until(lambda: unread(pipe.guest) == 14)
        assert pipe.run("read x; echo $x") == b"one\n"
        assert flags(pipe.home) == before
        with socket.socket(fileno=os.dup(pipe.home)) as at_home:
            assert at_home.recv(4) == b"two\n"
            writer.shutdown(socket.SHUT_WR)
            link.until(lambda: link.receiver.fin_at is not None)
        pipe.close()


def test_another_reader_at_home_does_not_upset_the_stream(
    stdin: tuple[Stdin, list[int]],
) -> None:
    pipe, writers = stdin
    os.write(writers[0], b"abc")
    pipe.link.until(lambda: unread(pipe.guest) == 3)
    os.read(pipe.home, 3)
    assert pipe.run("head -c3") == b"abc"
    os.write(writers[0], b"def")
    assert pipe.run("head -c3") == b"def"


def test_only_pipes_and_sockets_can_be_peeked_at(link: Link) -> None:
    with open(os.devnull) as null, pytest.raises(ValueError, match="peeked"):
        PeekSource(link.reactor, link.sender, null.fileno())


def test_unread_bytes_of_a_guest_follow_it_to_its_next_host(link: Link) -> None:
    home, writer = os.pipe()
    pipe = Stdin(link, home)
    os.write(writer, b"0123456789")
    link.until(lambda: unread(pipe.guest) == 10)
    assert os.read(pipe.guest, 4) == b"0123"
    assert pipe.sink.settle() == 4  # the guest is frozen
    link.keeper.detach()
    state = link.keeper.export_state()
    pipe.sink.close()  # the old pipe is gone, with 456789 in it
    os.write(writer, b"ab")
    link.keeper = Lifeline(
        link.reactor, "guest", epoch=1, leads=True, on_message=print, ping_seconds=0, state=state
    )
    receiver = link.keeper.open(1).receiver
    guest, write_end = os.pipe()
    sink = MeteredSink(link.reactor, receiver, write_end)
    link.attach()
    link.until(lambda: unread(guest) == 8)
    assert os.read(guest, 100) == b"456789ab"
    link.until(lambda: unread(pipe.home) == 0)
    sink.close()
    os.close(guest)
    os.close(writer)
    pipe.close()


# ---------------------------------------------------------------------- Duplex


def test_a_socket_speaks_both_ways_over_one_stream_and_a_cut(link: Link) -> None:
    client, here = socket.socketpair()
    server, there = socket.socketpair()
    left: list[str] = []
    Duplex(link.reactor, link.here, here.detach(), on_end=lambda: left.append("here"))
    Duplex(link.reactor, link.there, there.detach(), on_end=lambda: left.append("there"))
    with client, server:
        for round_number in range(4):
            request, answer = b"request %d" % round_number, b"answer %d" % round_number
            client.send(request)
            if round_number == 2:
                link.attach()
            link.until(lambda: unread(server.fileno()))
            assert server.recv(100) == request
            server.send(answer)
            link.until(lambda: unread(client.fileno()))
            assert client.recv(100) == answer
        client.shutdown(socket.SHUT_WR)
        collect = Collector(server.fileno())
        link.until(collect)
        assert left == []
        server.setblocking(True)
        server.send(b"last words")
        server.shutdown(socket.SHUT_WR)
        collect = Collector(client.fileno())
        link.until(collect)
        assert collect.data == b"last words"
        link.until(lambda: len(left) == 2)


def test_a_server_that_dies_ends_the_far_client(link: Link) -> None:
    client, here = socket.socketpair()
    server, there = socket.socketpair()
    left: list[str] = []
    Duplex(link.reactor, link.here, here.detach(), on_end=lambda: left.append("here"))
    Duplex(link.reactor, link.there, there.detach(), on_end=lambda: left.append("there"))
    with client:
        server.close()
        link.until(lambda: len(left) == 2)
        assert client.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            client.send(b"x")


def test_a_client_whose_server_stops_reading_can_still_be_answered(link: Link) -> None:
    client, here = socket.socketpair()
    server, there = socket.socketpair()
    left: list[str] = []
    Duplex(link.reactor, link.here, here.detach(), on_end=lambda: left.append("here"))
    Duplex(link.reactor, link.there, there.detach(), on_end=lambda: left.append("there"))
    with client, server:
        server.shutdown(socket.SHUT_RD)
        client.send(b"x")
        link.until(lambda: link.here.sender.reset)
        with pytest.raises(BrokenPipeError):
            client.send(b"y")
        server.send(b"answer")
        link.until(lambda: unread(client.fileno()))
        assert client.recv(100) == b"answer"
        server.close()
        link.until(lambda: len(left) == 2)
