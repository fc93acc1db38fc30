"""Processes become deputies: nobody who looks at them from outside may notice."""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent import injection, syscalls
from agent.deputy_link import (
    DeputyLink,
    DeputyListener,
    Held,
    Ready,
    Report,
    Signalled,
    process_state,
)
from agent.injection import Deputy, DeputyProgram, MuteDeputy, become_deputy
from migrate.errors import HostError

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs x86_64")

SCRIPT = Path(injection.__file__).with_name("deputy.py")
PATIENCE_SECONDS = 10
CONTINUED = 0xFFFF
NOTHING_PENDING = b"\nShdPnd:\t0000000000000000\n"

# The original's parent must be somebody else than its tracer, as at home.
PARENT = """
import os, sys
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)  # not orphaned, wherever the tests were started: a SIGTSTP stops it
    os.execv(sys.argv[1], sys.argv[1:])
print(pid, flush=True)
while True:
    _, status = os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)
    print(status, flush=True)
    if os.WIFEXITED(status) or os.WIFSIGNALED(status):
        break
"""
PRELUDE = "import os, resource, select, signal, sys, threading, time\n"
UP = "os.write(READY, b'.')\n"
ORIGINALS = {
    "reads": UP + "os.read(0, 1)",
    "sleeps": UP + "time.sleep(1000)",
    "waits for a lock": UP + "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "spins": UP + "while True: pass",
    "polls, which restarts": UP + "select.poll().poll(1000000)",
    "pauses": UP + "signal.pause()",
    "has threads": (
        "def spin():\n  while True: pass\n"
        "for work in [spin, spin, lambda: time.sleep(1000), lambda: os.read(0, 1)]:\n"
        "  threading.Thread(target=work, daemon=True).start()\n" + UP + "time.sleep(1000)"
    ),
}


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a change of the kernel's that nothing announces."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@dataclass
class Original:
    """A process, and what its parent sees of it."""

    pid: int
    parent: subprocess.Popen[str]
    group: Path | None
    """Its cgroup, if the machine has a cgroup v2 to freeze it in."""
    output: int
    """The reading end of its stdout and stderr."""

    def freeze(self) -> None:
        self._set_frozen(True)

    def thaw(self) -> None:
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        if self.group is None:
            return
        (self.group / "cgroup.freeze").write_text(str(int(frozen)))
        events = self.group / "cgroup.events"
        if frozen:
            eventually(lambda: "frozen 1" in events.read_text())

    def adopt(self, pid: int) -> None:
        """Have this process frozen with it."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(pid))

    def remove_group(self) -> None:
        if self.group is not None:
            events = self.group / "cgroup.events"
            eventually(lambda: "populated 0" in events.read_text())
            self.group.rmdir()

    def next_status(self) -> int:
        """The next wait status that its parent got."""
        assert self.parent.stdout is not None
        return int(self.parent.stdout.readline())

    def ids(self) -> tuple[int, ...]:
        """Parent, group, session, terminal, foreground group: proc(5), fields 4 to 8."""
        return tuple(map(int, self._stat().split()[1:6]))

    def _stat(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2]

    def read(self, name: str) -> bytes:
        return Path(f"/proc/{self.pid}/{name}").read_bytes()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class Guard:
    """The guard's end of the connection, and what came over it but was not asked for yet."""

    link: DeputyLink
    backlog: list[Report] = field(default_factory=list)

    def hears(self, count: int = 1) -> list[Report]:
        """The next reports, so many."""
        while len(self.backlog) < count:
            assert select.select([self.link], [], [], PATIENCE_SECONDS)[0], self.backlog
            self.backlog += self.link.receive()
        taken, self.backlog = self.backlog[:count], self.backlog[count:]
        return taken


@dataclass
class Home:
    """Makes originals, and a socket for their deputies; removes all of it."""

    directory: Path
    cgroups: Path | None
    originals: list[Original] = field(default_factory=list)
    listener: DeputyListener | None = None

    def start(self, code: str) -> Original:
        """Run Python code as an original, up to where it has written to READY."""
        ready, ready_there = os.pipe()
        output, output_there = os.pipe()
        program = [sys.executable, "-I", "-S", "-c", f"{PRELUDE}READY = {ready_there}\n{code}"]
        parent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PARENT, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output_there,
            pass_fds=[ready_there],
            text=True,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        )
        os.close(ready_there)
        os.close(output_there)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        group = self._group(pid)
        original = Original(pid, parent, group, output)
        self.originals.append(original)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        return original

    def _group(self, pid: int) -> Path | None:
        if self.cgroups is None:
            return None
        group = self.cgroups / f"migrate-test-{os.getpid()}-{pid}"
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
        return group

    def program(self, **changes: Path) -> DeputyProgram:
        parts = {"python": Path(sys.executable).resolve(), "script": SCRIPT, **changes}
        return DeputyProgram(**parts, socket=self.directory / "guard")

    def turn(
        self,
        original: Original,
        program: DeputyProgram | None = None,
        thaw: Callable[[], None] | None = None,
        members: Collection[int] = (),
        keep_fds: Collection[int] = (0, 1, 2),
        imaged_signals: Collection[int] = (),
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> Deputy | MuteDeputy:
        """The original becomes the deputy; somebody listens for it already."""
        user = Path(f"/proc/{original.pid}").stat()
        self.listen(original.pid, user.st_uid, user.st_gid)
        original.freeze()
        return become_deputy(
            original.pid,
            thaw=thaw or original.thaw,
            program=program or self.program(),
            members=members,
            keep_fds=keep_fds,
            imaged_signals=imaged_signals,
            timeout_seconds=timeout_seconds,
        )

    def listen(self, pid: int, uid: int, gid: int) -> None:
        if self.listener is not None:
            self.listener.close()
        self.listener = DeputyListener(self.directory / "guard", pid, uid, gid)

    def guard(self) -> Guard:
        """The connection of the deputy that was made last, after it said READY."""
        assert self.listener is not None
        link = None
        while link is None:
            assert select.select([self.listener], [], [], PATIENCE_SECONDS)[0]
            link = self.listener.accept()
        guard = Guard(link)
        assert guard.hears() == [Ready()]
        return guard

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
        for original in self.originals:
            original.thaw()
            if original.parent.poll() is None and process_state(original.pid) not in (None, "Z"):
                os.kill(original.pid, signal.SIGKILL)
            original.parent.communicate(timeout=PATIENCE_SECONDS)
            os.close(original.output)
            original.remove_group()


def writable_cgroups() -> Path | None:
    """Where cgroup v2 is mounted, if groups can be made there."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(where, os.W_OK) and os.geteuid() == 0:
            return Path(where)
    return None


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        home = Home(Path(directory), writable_cgroups())
        try:
            yield home
        finally:
            home.close()


@pytest.mark.parametrize("code", ORIGINALS.values(), ids=ORIGINALS.keys())
def test_looks_as_before_and_ends_as_told(home: Home, code: str) -> None:
    original = home.start(code)
    looks = original.ids(), original.read("comm"), original.read("environ")
    command_line = original.read("cmdline")
    result = home.turn(original)
    assert result == Deputy(original.pid, stopped=False)
    assert (original.ids(), original.read("comm"), original.read("environ")) == looks
    assert original.read("cmdline").rstrip(b"\0") == command_line.rstrip(b"\0")
    assert Path(f"/proc/{original.pid}/exe").readlink() == Path(sys.executable).resolve()
    guard = home.guard()
    original.send(signal.SIGTERM)
    assert guard.hears() == [Signalled(signal.SIGTERM)]
    guard.link.end(7)
    assert original.next_status() == 7 << 8


def test_dies_by_the_signal_without_a_core(home: Home) -> None:
    original = home.start(
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n" + ORIGINALS["sleeps"]
    )
    home.turn(original)
    home.guard().link.end(-signal.SIGSEGV)
    assert original.next_status() == signal.SIGSEGV


def test_stopped_stays_stopped(home: Home) -> None:
    original = home.start(ORIGINALS["has threads"])
    original.send(signal.SIGTSTP)
    assert os.WSTOPSIG(original.next_status()) == signal.SIGTSTP
    assert home.turn(original) == Deputy(original.pid, stopped=True)
    guard = home.guard()
    eventually(lambda: process_state(original.pid) == "T")
    original.send(signal.SIGCONT)
    assert original.next_status() == CONTINUED  # and no stop before it
    assert guard.hears() == [Signalled(signal.SIGCONT)]
    guard.link.end(0)
    assert original.next_status() == 0


def test_signals_of_the_image_are_dropped_and_new_ones_are_not(home: Home) -> None:
    # The kernel carries out a deadly default action even on a frozen process: so handlers.
    original = home.start(
        "for number in (signal.SIGTERM, signal.SIGRTMIN + 1):\n"
        "  signal.signal(number, lambda *_: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGRTMIN])\n"
        "for number in (signal.SIGUSR1, signal.SIGRTMIN, signal.SIGRTMIN):\n"
        "  os.kill(os.getpid(), number)\n" + ORIGINALS["sleeps"]
    )
    later = [signal.SIGTERM, signal.SIGRTMIN, signal.SIGRTMIN + 1]
    original.freeze()
    if original.group is not None:
        for number in later:
            original.send(number)
    imaged = [signal.SIGUSR1, signal.SIGRTMIN, signal.SIGRTMIN]
    assert isinstance(home.turn(original, imaged_signals=imaged), Deputy)
    if original.group is None:
        for number in later:
            original.send(number)
    guard = home.guard()
    assert guard.hears(3) == [Signalled(number) for number in later]
    original.send(signal.SIGUSR1)
    assert guard.hears() == [Signalled(signal.SIGUSR1)]


def test_timers_of_the_original_are_silent(home: Home) -> None:
    original = home.start(
        "signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)\n" + UP + "while True: signal.pause()"
    )
    assert isinstance(home.turn(original), Deputy)
    guard = home.guard()
    # The last one is gone: it would swallow the next, and be taken for the timer's.
    assert NOTHING_PENDING in original.read("status")
    original.send(signal.SIGUSR1)
    assert guard.hears() == [Signalled(signal.SIGUSR1)]
    original.send(signal.SIGALRM)
    assert guard.hears() == [Signalled(signal.SIGALRM)]
    guard.link.hold()
    assert guard.hears() == [Held()]
    time.sleep(0.02)  # in which a live timer would leave its signal pending
    assert NOTHING_PENDING in original.read("status")


def test_soft_limits_do_not_keep_it_from_starting(home: Home) -> None:
    original = home.start(
        UP + "for name, soft in dict(NOFILE=4, AS=1 << 20, DATA=1 << 16, STACK=1 << 16).items():\n"
        "  number = getattr(resource, 'RLIMIT_' + name)\n"
        "  resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))\n"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    assert os.WIFSTOPPED(original.next_status())
    assert home.turn(original) == Deputy(original.pid, stopped=True)


def failing_programs(home: Home) -> dict[str, DeputyProgram]:
    plain = home.directory / "plain"
    plain.write_text("no program")
    broken = home.directory / "broken.py"
    broken.write_text("print('noise')\nraise RuntimeError")
    crashing = home.directory / "crashing.py"
    crashing.write_text("import posix; posix.kill(posix.getpid(), 9) if 0 else posix.abort()")
    return {
        "script absent": home.program(script=home.directory / "absent"),
        "python absent": home.program(python=home.directory / "absent"),
        "python not executable": home.program(python=plain),
        "script fails": home.program(script=broken),
        "script crashes": home.program(script=crashing),
    }


@pytest.mark.parametrize("exit_code", [0, 3, -signal.SIGTERM, -signal.SIGABRT, -signal.SIGKILL])
@pytest.mark.parametrize(
    "failure",
    ["script absent", "python absent", "python not executable", "script fails", "script crashes"],
)
def test_becomes_mute_if_the_program_fails(home: Home, failure: str, exit_code: int) -> None:
    code = ORIGINALS["has threads" if exit_code in (3, -signal.SIGABRT) else "sleeps"]
    original = home.start("signal.signal(signal.SIGTERM, lambda *_: None)\n" + code)
    result = home.turn(original, failing_programs(home)[failure])
    assert isinstance(result, MuteDeputy)
    for number in (signal.SIGTERM, signal.SIGABRT):
        original.send(number)  # the guest's affair: it must not end the mute
    eventually(lambda: process_state(original.pid) == "S")
    result.finish(exit_code)
    assert os.waitstatus_to_exitcode(original.next_status()) == exit_code
    os.set_blocking(original.output, False)
    original.parent.wait(PATIENCE_SECONDS)
    assert os.read(original.output, 1000) == b""


@pytest.mark.parametrize("exit_code", [5, -signal.SIGTERM])
def test_mute_ends_even_if_stopped(home: Home, exit_code: int) -> None:
    original = home.start(ORIGINALS["sleeps"])
    original.send(signal.SIGSTOP)
    original.next_status()
    result = home.turn(original, failing_programs(home)["script absent"])
    assert isinstance(result, MuteDeputy)
    assert result.stopped
    eventually(lambda: process_state(original.pid) == "T")
    result.finish(exit_code)
    assert os.waitstatus_to_exitcode(original.next_status()) == exit_code


def test_becomes_mute_if_the_start_takes_too_long(home: Home) -> None:
    endless = home.directory / "endless.py"
    endless.write_text("while True: pass")
    original = home.start(ORIGINALS["sleeps"])
    result = home.turn(original, home.program(script=endless), timeout_seconds=0.5)
    assert isinstance(result, MuteDeputy)
    eventually(lambda: process_state(original.pid) == "S")
    result.finish(4)
    assert original.next_status() == 4 << 8


def test_finish_refuses_a_process_that_is_no_mute_deputy(home: Home) -> None:
    original = home.start(ORIGINALS["sleeps"])
    with pytest.raises(HostError, match="no mute deputy"):
        injection.finish(original.pid, 0)
    eventually(lambda: process_state(original.pid) == "S")


def test_hostile_environment_is_left_out_and_the_rest_kept(home: Home) -> None:
    original = home.start(
        "if 'LD_PRELOAD' not in os.environ:\n"
        "  os.environ.update(LD_PRELOAD='/absent', PYTHONHOME='/absent', KEPT='here')\n"
        "  os.execv(sys.executable, [sys.executable, '-I', '-S', '-c', sys.orig_argv[-1]])\n"
        + ORIGINALS["sleeps"]
    )
    assert b"LD_PRELOAD" in original.read("environ")
    assert isinstance(home.turn(original), Deputy)
    environment = original.read("environ")
    assert b"\0KEPT=here\0" in environment
    assert b"LD_PRELOAD" not in environment
    assert b"PYTHONHOME" not in environment


def test_keeps_the_descriptors_asked_for_and_no_others(home: Home) -> None:
    original = home.start(
        "os.dup2(os.open('/dev/null', os.O_RDONLY), 40, inheritable=False)\n"
        "os.dup2(1, 41, inheritable=True)\n"
        "os.close(0)\n" + ORIGINALS["sleeps"]
    )
    copies = injection.copy_fds(original.pid, [1, 40])
    assert Path(f"/proc/self/fd/{copies[1]}").readlink() == Path("/dev/null")
    for copy in copies:
        os.close(copy)
    home.turn(original, keep_fds=[0, 1, 2, 40])
    guard = home.guard()
    open_now = {int(fd.name) for fd in Path(f"/proc/{original.pid}/fd").iterdir()}
    assert {1, 2, 40} < open_now
    assert 41 not in open_now
    assert len(open_now) == 5  # and its signalfd and its socket
    assert Path(f"/proc/{original.pid}/fd/40").readlink() == Path("/dev/null")
    guard.link.close_descriptor(40)
    guard.link.hold()
    assert guard.hears() == [Held()]
    assert not Path(f"/proc/{original.pid}/fd/40").is_symlink()


def test_members_die_and_leave_no_zombies(home: Home) -> None:
    original = home.start(
        "child = os.fork()\n"
        "if child == 0: time.sleep(1000)\n"
        "print(child, flush=True, file=sys.stderr)\n" + ORIGINALS["sleeps"]
    )
    child = int(os.read(original.output, 20))
    pidfd = os.pidfd_open(child)
    home.turn(original, members=[pidfd])
    os.close(pidfd)
    guard = home.guard()
    eventually(lambda: process_state(child) is None)
    original.send(signal.SIGCHLD)
    assert guard.hears() == [Signalled(signal.SIGCHLD)]  # not the child's own


def start_amid_vfork(home: Home) -> tuple[Original, int]:
    """An original that waits, uninterruptibly, for its child to exec; and the child's pidfd."""
    fifo = home.directory / "fifo"
    os.mkfifo(fifo)
    action = f"(os.POSIX_SPAWN_OPEN, 0, {str(fifo)!r}, os.O_RDONLY, 0)"
    original = home.start(
        UP + f"os.posix_spawn('/bin/true', ['true'], {{}}, file_actions=[{action}])\n"
        "time.sleep(1000)"
    )
    children = f"task/{original.pid}/children"
    eventually(lambda: original.read(children) != b"")
    child = int(original.read(children))
    eventually(lambda: process_state(child) == "S")
    original.adopt(child)
    return original, os.pidfd_open(child)


def test_amid_vfork(home: Home) -> None:
    original, child = start_amid_vfork(home)
    assert home.turn(original, members=[child]) == Deputy(original.pid, stopped=False)
    os.close(child)


def test_can_be_tried_again_if_a_thread_does_not_stop(home: Home) -> None:
    original, child = start_amid_vfork(home)
    with pytest.raises(HostError, match="did not stop in time"):
        home.turn(original, timeout_seconds=0.1)
    signal.pidfd_send_signal(child, signal.SIGKILL)
    os.close(child)
    assert home.turn(original) == Deputy(original.pid, stopped=False)
    home.guard().link.end(2)
    assert original.next_status() == 2 << 8


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_users_process(home: Home) -> None:
    original = home.start("os.setgid(65534); os.setuid(65534)\n" + ORIGINALS["sleeps"])
    script = home.directory / "deputy.py"  # the checkout may be closed to others
    script.write_bytes(SCRIPT.read_bytes())
    python = Path("/usr/bin/python3")
    result = home.turn(original, home.program(python=python, script=script))
    assert result == Deputy(original.pid, stopped=False)
    assert b"Uid:\t65534\t65534\t65534\t65534\n" in original.read("status")
    home.guard().link.end(9)
    assert original.next_status() == 9 << 8


def test_original_killed_before(home: Home) -> None:
    original = home.start(ORIGINALS["sleeps"])
    original.freeze()
    original.send(signal.SIGKILL)
    with pytest.raises(HostError, match=str(original.pid)):
        become_deputy(original.pid, thaw=original.thaw, program=home.program())
    assert original.next_status() == signal.SIGKILL


def test_original_killed_while_it_is_held(home: Home) -> None:
    original = home.start(ORIGINALS["has threads"])

    def thaw_and_kill() -> None:
        original.thaw()
        original.send(signal.SIGKILL)

    with pytest.raises(HostError, match="died"):
        home.turn(original, thaw=thaw_and_kill)
    assert original.next_status() == signal.SIGKILL


def test_can_be_tried_again_if_the_thaw_fails(home: Home) -> None:
    original = home.start(ORIGINALS["has threads"])

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        home.turn(original, thaw=fail)
    assert isinstance(home.turn(original), Deputy)
    home.guard().link.end(1)
    assert original.next_status() == 1 << 8


def test_original_does_not_run_on_if_its_guard_dies(home: Home) -> None:
    original = home.start("os.set_blocking(2, True)\n" + UP + "while True: os.write(2, b'.')")

    def thaw_and_die() -> None:
        original.thaw()
        os.kill(os.getpid(), signal.SIGKILL)

    guard = os.fork()
    if guard == 0:
        home.turn(original, thaw=thaw_and_die)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(guard, 0)[1]) == signal.SIGKILL
    assert original.next_status() == signal.SIGKILL


@pytest.mark.parametrize("round_", range(30))
def test_no_moment_is_the_wrong_one(home: Home, round_: int) -> None:
    original = home.start(
        UP + "def work():\n"
        "  while True: os.getppid(); time.sleep(0.0001)\n"
        f"for _ in range({round_ % 4}): threading.Thread(target=work, daemon=True).start()\n"
        "work()"
    )
    time.sleep(round_ / 5000)
    assert home.turn(original) == Deputy(original.pid, stopped=False)
    home.guard().link.end(round_)
    assert original.next_status() == round_ << 8


def test_fork_with_a_chosen_pid() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    probe = os.fork()
    if probe == 0:
        os._exit(0)
    os.waitpid(probe, 0)  # so this pid was free a moment ago
    child = syscalls.fork_with_pid(probe)
    if child == 0:
        os._exit(0 if os.getpid() == probe else 1)
    assert child == probe
    assert os.waitpid(child, 0)[1] == 0
