"""The deputy's side of its protocol, and the guard's: agent/deputy.py, agent/deputy_link.py."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent import deputy_link, syscalls
from agent.deputy_link import (
    Broken,
    Continued,
    DeputyLink,
    DeputyListener,
    Gone,
    Held,
    Ready,
    Report,
    Signalled,
    process_state,
)

SCRIPT = Path(deputy_link.__file__).with_name("deputy.py")
PATIENCE_SECONDS = 10
CONTINUED = 0xFFFF
RSS_LIMIT_KB = 12 << 10


@dataclass
class Stand:
    """A deputy that is this process's child, and its guard: this process."""

    socket: Path
    imaged: str = ""
    pid: int = 0
    listener: DeputyListener | None = None
    link: DeputyLink | None = None
    backlog: list[Report] = field(default_factory=list)

    def start(
        self, *, group: int | None = None, listen: bool = True, inherit_child: bool = False
    ) -> None:
        """Start the deputy as injection does: all signals blocked, a signalfd inherited."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            signals = syscalls.signalfd(syscalls.ALL_SIGNALS, 0)
            if group is not None:
                os.setpgid(0, group)
            if inherit_child and os.fork() == 0:
                signal.sigwait([signal.SIGUSR1])
                os._exit(0)
            arguments = [str(self.socket), "näme", str(signals), "0,1,2", self.imaged]
            options = ["-I", "-S", "-X", "utf8", str(SCRIPT)]
            os.execv(sys.executable, [sys.executable, *options, *arguments])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if listen:
            self.listen()
            self.await_connection()

    def listen(self) -> None:
        self.listener = DeputyListener(self.socket, self.pid, os.getuid(), os.getgid())

    def await_connection(self) -> None:
        assert self.listener is not None
        self.link = None
        while self.link is None:
            assert select.select([self.listener], [], [], PATIENCE_SECONDS)[0]
            self.link = self.listener.accept()
        assert self.hears() == [Ready()]

    def hears(self, count: int = 1) -> list[Report]:
        """The next reports, so many."""
        assert self.link is not None
        while len(self.backlog) < count:
            assert select.select([self.link], [], [], PATIENCE_SECONDS)[0], self.backlog
            self.backlog += self.link.receive()
        taken, self.backlog = self.backlog[:count], self.backlog[count:]
        return taken

    def guard(self) -> DeputyLink:
        assert self.link is not None
        return self.link

    def lose_guard(self) -> None:
        """The guard dies, with its socket."""
        assert self.listener is not None
        self.guard().close()
        self.listener.close()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def next_status(self) -> int:
        """The next wait status that the deputy's parent gets."""
        status = os.waitpid(self.pid, os.WUNTRACED | os.WCONTINUED)[1]
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            self.pid = 0
        return status

    def close(self) -> None:
        if self.link is not None:
            self.link.close()
        if self.listener is not None:
            self.listener.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def stand(directory: Path) -> Iterator[Stand]:
    stand = Stand(directory / "guard")
    try:
        yield stand
    finally:
        stand.close()


def catchable() -> list[int]:
    """All signals that a process can be sent and catch."""
    return sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})


def test_every_signal_is_reported_once(stand: Stand) -> None:
    stand.start()
    for number in catchable():
        stand.send(number)
        assert stand.hears() == [Signalled(number)]


def test_queued_signals_keep_number_order_and_value(stand: Stand) -> None:
    stand.start()
    values = [0, 7, (1 << 64) - 1, 7]
    for value in values:
        syscalls.queue_signal(stand.pid, signal.SIGRTMIN + 3, value)
    assert stand.hears(4) == [Signalled(signal.SIGRTMIN + 3, value) for value in values]
    syscalls.queue_signal_to_thread(stand.pid, stand.pid, signal.SIGUSR1, 5)
    assert stand.hears() == [Signalled(signal.SIGUSR1, 5)]


def test_signals_from_before_the_start_are_reported(stand: Stand) -> None:
    stand.start(listen=False)
    stand.send(signal.SIGSTOP)
    stand.next_status()
    for number in (signal.SIGTERM, signal.SIGRTMIN, signal.SIGRTMIN):
        stand.send(number)
    stand.send(signal.SIGCONT)
    stand.listen()
    stand.await_connection()
    expected = [signal.SIGTERM, signal.SIGCONT, signal.SIGRTMIN, signal.SIGRTMIN]
    assert stand.hears(4) == [Signalled(number) for number in expected]


def test_buries_the_children_of_the_original(stand: Stand) -> None:
    stand.start(inherit_child=True)
    children = Path(f"/proc/{stand.pid}/task/{stand.pid}/children")
    child = int(children.read_text())
    pidfd = os.pidfd_open(child)
    os.kill(child, signal.SIGUSR1)
    assert select.select([pidfd], [], [], PATIENCE_SECONDS)[0]
    os.close(pidfd)
    stand.send(signal.SIGWINCH)  # a higher number than SIGCHLD's: it is read after it
    assert stand.hears() == [Signalled(signal.SIGWINCH)]
    assert process_state(child) is None


def test_signals_of_the_image_are_dropped_once(stand: Stand) -> None:
    stand.imaged = f"{signal.SIGUSR1},{signal.SIGRTMIN},{signal.SIGRTMIN}"
    stand.start()
    for _ in range(3):
        stand.send(signal.SIGRTMIN)
    assert stand.hears() == [Signalled(signal.SIGRTMIN)]
    stand.send(signal.SIGUSR1)
    stand.send(signal.SIGUSR2)
    assert stand.hears() == [Signalled(signal.SIGUSR2)]
    stand.send(signal.SIGUSR1)
    assert stand.hears() == [Signalled(signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU])
def test_stops_as_its_guest_and_continues(stand: Stand, number: int) -> None:
    stand.start(group=0)  # not orphaned: its parent is in another group of this session
    stand.guard().stop(number)
    status = stand.next_status()
    assert os.WIFSTOPPED(status)
    assert os.WSTOPSIG(status) == number
    assert process_state(stand.pid) == "T"
    stand.send(signal.SIGCONT)
    assert stand.next_status() == CONTINUED
    assert stand.hears() == [Continued()]
    stand.send(signal.SIGUSR1)
    assert stand.hears() == [Signalled(signal.SIGUSR1)]  # the SIGCONT came once


def test_stop_signals_wait_for_the_guard(stand: Stand) -> None:
    stand.start(group=0)
    stand.send(signal.SIGTSTP)
    assert stand.hears() == [Signalled(signal.SIGTSTP)]
    stand.guard().hold()
    assert stand.hears() == [Held()]  # so it was not stopped
    stand.guard().stop(signal.SIGTSTP)
    assert os.WSTOPSIG(stand.next_status()) == signal.SIGTSTP


def test_stops_in_an_orphaned_group_too(directory: Path) -> None:
    """There the kernel ignores SIGTSTP. The session leader here is the deputy's own parent."""
    script = f"""
import os, sys
sys.path.insert(0, {str(SCRIPT.parents[1])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
os.setsid()
from test_deputy import *
stand = Stand(Path({str(directory / "guard")!r}))
stand.start()
stand.guard().stop(signal.SIGTSTP)
print(os.WSTOPSIG(stand.next_status()), flush=True)
stand.send(signal.SIGCONT)
assert stand.next_status() == CONTINUED
assert stand.hears() == [Continued()]
stand.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=True
    )
    assert int(done.stdout) == signal.SIGSTOP


@pytest.mark.parametrize("code", [0, 1, 255])
def test_exits(stand: Stand, code: int) -> None:
    stand.start()
    stand.guard().end(code)
    assert stand.hears(2) == [Gone(), Broken()]
    assert stand.next_status() == code << 8


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGRTMAX],
)
def test_dies_by_the_signal(stand: Stand, number: int) -> None:
    stand.start()
    stand.guard().end(-number)
    assert stand.next_status() == number


def test_a_death_by_no_deadly_signal_is_one_by_kill(stand: Stand) -> None:
    stand.start()
    stand.guard().end(-signal.SIGWINCH)
    assert stand.next_status() == signal.SIGKILL


def test_held_signals_stay_pending(stand: Stand) -> None:
    stand.start()
    stand.guard().hold()
    assert stand.hears() == [Held()]
    stand.send(signal.SIGTERM)
    stand.guard().hold()
    assert stand.hears() == [Held()]  # and no signal before it
    stand.guard().free()
    assert stand.hears() == [Signalled(signal.SIGTERM)]


def test_outlives_its_guard_and_loses_no_signal(stand: Stand) -> None:
    stand.start()
    stand.lose_guard()
    stand.send(signal.SIGTERM)
    stand.send(signal.SIGUSR1)
    stand.listen()
    stand.await_connection()
    # Which of the two was read before the loss was noticed is open.
    heard = stand.hears(2)
    assert set(heard) == {Signalled(signal.SIGTERM), Signalled(signal.SIGUSR1)}


def test_repeats_what_a_dead_guard_did_not_read(stand: Stand) -> None:
    stand.start()
    stand.send(signal.SIGTERM)
    assert select.select([stand.guard()], [], [], PATIENCE_SECONDS)[0]
    stand.lose_guard()
    stand.listen()
    stand.await_connection()
    assert stand.hears() == [Signalled(signal.SIGTERM)]


def test_does_not_repeat_what_was_read(stand: Stand) -> None:
    stand.start()
    stand.send(signal.SIGTERM)
    assert stand.hears() == [Signalled(signal.SIGTERM)]
    stand.guard().hold()
    assert stand.hears() == [Held()]  # so GOT, which came before HOLD, was read
    stand.lose_guard()
    stand.listen()
    stand.await_connection()
    stand.send(signal.SIGUSR1)
    assert stand.hears() == [Signalled(signal.SIGUSR1)]


@pytest.mark.parametrize(
    "noise",
    [
        *(b"\xff\n", b"EXIT\n", b"KILLED x\n", b"STOP\n", b"CLOSE 99\n", b"NEWER 1\n"),
        *(b"x" * 20000, b"\n" * 99),
    ],
)
def test_survives_nonsense(stand: Stand, noise: bytes) -> None:
    stand.start()
    link = stand.guard()
    with contextlib.suppress(OSError):
        link._connection.send(noise)
    link.close()
    stand.await_connection()
    stand.send(signal.SIGTERM)
    assert stand.hears() == [Signalled(signal.SIGTERM)]


def test_is_small_has_the_name_and_uses_no_cpu(stand: Stand) -> None:
    stand.start()
    stand.send(signal.SIGTERM)
    stand.hears()
    status = Path(f"/proc/{stand.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(fields["VmRSS"].split()[0]) < RSS_LIMIT_KB
    assert fields["Name"] == "näme"
    switches = int(fields["voluntary_ctxt_switches"])
    time.sleep(0.2)  # a polling deputy would wake up in it
    status = Path(f"/proc/{stand.pid}/status").read_text()
    assert f"\nvoluntary_ctxt_switches:\t{switches + 1}\n" in status or (
        f"\nvoluntary_ctxt_switches:\t{switches}\n" in status
    )


def test_the_socket_takes_nobody_but_the_deputy(directory: Path) -> None:
    path = directory / "guard"
    with DeputyListener(path, 1, os.getuid(), os.getgid()) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        assert listener.accept() is None
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            assert listener.accept() is None
            assert stranger.recv(1) == b""
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"READY\nCONT\n", [Ready(), Continued()]),
        (b"SIG 15\nSIG 34 99\n", [Signalled(15), Signalled(34, 99)]),
        (b"SIG\nSIG x\nSIG 0\nSIG 65\nSIG -1\nSIG 15 -1\nSIG 15 x\n\n\xff\n", []),
        (b"SI", []),
        (b"x" * 10000, [Broken()]),
        (b"", [Broken()]),
    ],
)
def test_the_guard_believes_only_sound_reports(text: bytes, expected: list[Report]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(text)
        if not text:
            theirs.shutdown(socket.SHUT_WR)
        link = DeputyLink(ours)
        found: list[Report] = []
        while select.select([link], [], [], 0)[0] and Broken() not in found:
            found += link.receive()
        link.close()
    assert found == expected


def test_state_of_a_process() -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    assert process_state(child) in ("R", "S")
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert process_state(child) == "Z"
    os.waitpid(child, 0)
    assert process_state(child) is None
