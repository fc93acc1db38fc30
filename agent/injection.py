"""Make the frozen original of a process into its deputy, or into a mute one if that fails.

The original is held by ptrace, its signals are blocked, it is thawed, and made to call execve on
agent/deputy.py. From the thaw on, the kernel kills it if this process dies (PTRACE_O_EXITKILL): its
guest runs elsewhere by then, and it must never run on. The hold lasts until the new program waits
in its main loop: the interpreter may fail to start for many reasons (limits, files, memory), and a
deputy that ended then would look like an end of the guest. What the new program writes to stdout
and stderr until then is dropped.

A process in group-stop (^Z) stays in it: ptrace lets it run through its start, and when let go it
is stopped again, with no report to its parent. Its READY is in the socket by then; it answers after
the SIGCONT, which it reports as any signal.

A signal whose default action kills does so at once, also in a frozen process, unless a tracer holds
it: an original may die before it is held here. Its parent has seen that death then, and its guest
is to be killed.

A mute deputy is the original, or what execve left of it, with all signals blocked in pause(2): it
stays without help, and can still be stopped, continued and killed. x86_64 only.
"""

import contextlib
import os
import re
import resource
import select
import signal
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import syscalls
from agent.process_memory import Memory, NoRoomError, scratch
from agent.ptrace_hold import (
    NO_SYSCALL,
    FailedError,
    GoneError,
    Hold,
    LateError,
    child_signal_blocked,
    signed,
)
from migrate.errors import HostError

# Numbers of x86_64 (asm/unistd_64.h), which a tracee is made to call.
_WRITE, _POLL, _WRITEV, _EXECVE, _EXIT, _FCNTL = 1, 7, 20, 59, 60, 72
_EXIT_GROUP, _PPOLL, _SIGNALFD4, _PRLIMIT64 = 231, 271, 289, 302

_ENVIRONMENT_LIMIT = _COMMAND_LINE_LIMIT = 1 << 15
_INFINITY = (1 << 64) - 1
_STACK_BYTES = 8 << 20
_LIMITS_TO_CHANGE = {
    "Max core file size": resource.RLIMIT_CORE,
    "Max address space": resource.RLIMIT_AS,
    "Max data size": resource.RLIMIT_DATA,
    "Max cpu time": resource.RLIMIT_CPU,
    "Max open files": resource.RLIMIT_NOFILE,
    "Max stack size": resource.RLIMIT_STACK,
}
# They would change how the interpreter starts, or whether it does.
_UNWANTED_ENVIRONMENT = re.compile(rb"(LD_|PYTHON|MALLOC_|GLIBC_TUNABLES=|GCONV_PATH=|LOCPATH=)")


@dataclass(frozen=True)
class DeputyProgram:
    """What the original is turned into; its user must be able to read both files."""

    python: Path
    script: Path
    """agent/deputy.py."""
    socket: Path
    """Where the guard listens (`DeputyListener`); it should do so before."""


@dataclass(frozen=True)
class Deputy:
    """The original is the deputy now."""

    pid: int
    stopped: bool
    """It was in group-stop and is again: it obeys only after SIGCONT."""


@dataclass(frozen=True)
class MuteDeputy:
    """The original holds its place in pause(2), since it could not become a deputy."""

    pid: int
    stopped: bool
    reason: str

    def finish(self, exit_code: int, timeout_seconds: float = 10) -> None:
        """Make it end: 0 to 255, or minus a signal (`os.waitstatus_to_exitcode`); no core file.

        It need not be the same process (a guard restarted) that made it.

        :raises HostError: it is gone, cannot be held, or is no mute deputy (a reused pid).
        """
        finish(self.pid, exit_code, timeout_seconds)


def become_deputy(
    pid: int,
    *,
    thaw: Callable[[], None],
    program: DeputyProgram,
    members: Collection[int] = (),
    keep_fds: Collection[int] = (0, 1, 2),
    imaged_signals: Collection[int] = (),
    timeout_seconds: float = 10,
) -> Deputy | MuteDeputy:
    """Turn the frozen process `pid` into its deputy. To be called from a process with one thread.

    :param thaw: thaws the cgroup; called once, when the original cannot run by itself any more.
    :param members: pidfds of the other processes of the tree; they are killed first.
    :param keep_fds: those of its descriptors that the deputy keeps open, so that a guard started
        anew can take them again with pidfd_getfd; the others are closed. Take copies before.
    :param imaged_signals: pending in the image (leader's and shared), once for each instance: they
        are the guest's already, so the deputy forgets as many.
    :raises HostError: before the thaw: all is frozen as it was, and it may be tried again; or the
        original died. Other errors, after the thaw: it was killed rather than let run.
    """
    syscalls.require_x86_64()
    deadline = time.monotonic() + timeout_seconds
    _kill(members, deadline)
    looks = _Looks.of(pid)
    with child_signal_blocked():
        hold = Hold(pid, deadline)
        try:
            hold.seize()
            hold.block_signals()
            hold.require_64_bit()
            hold.kill_with_tracer()
            thaw()
        except ProcessLookupError as error:
            hold.bury()
            raise GoneError(pid) from error
        except BaseException:
            hold.let_go()
            raise
        try:
            reason = _turn(hold, looks, program, keep_fds, imaged_signals)
            if reason is None:
                hold.let_go()
                return Deputy(pid, hold.stopped)
            hold.park()
            return MuteDeputy(pid, hold.stopped, reason)
        except BaseException as error:
            # Whatever it was: the guest runs elsewhere, a second copy must not.
            hold.bury()
            if isinstance(error, ProcessLookupError):
                raise GoneError(pid) from error
            raise


def finish(pid: int, exit_code: int, timeout_seconds: float = 10) -> None:
    """`MuteDeputy.finish` for a pid that was written down."""
    with child_signal_blocked():
        hold = Hold(pid, time.monotonic() + timeout_seconds)
        try:
            hold.seize()
            hold.require_parked()
            if exit_code == -signal.SIGKILL:
                hold.bury()
                return
            if exit_code >= 0:
                hold.start_call(_EXIT_GROUP, exit_code)
            else:
                hold.make_deadly(-exit_code)
                os.kill(pid, -exit_code)
            hold.run_to_death()
        finally:
            hold.let_go()


def copy_fds(pid: int, fds: Sequence[int]) -> list[int]:
    """Duplicates (close-on-exec) of another process's descriptors, in this order.

    :raises OSError: one is not open; then none is left open here.
    """
    pidfd = os.pidfd_open(pid)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, pidfd)
        copies: list[int] = []
        with contextlib.ExitStack() as on_failure:
            for fd in fds:
                copies.append(syscalls.pidfd_getfd(pidfd, fd))
                on_failure.callback(os.close, copies[-1])
            on_failure.pop_all()
        return copies


@dataclass(frozen=True)
class _Looks:
    """What others see of the original in /proc."""

    comm: bytes
    command_line: bytes
    environment: list[bytes]
    limits: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, pid: int) -> "_Looks":
        proc = Path(f"/proc/{pid}")
        try:
            environment, size = [], 0
            for entry in proc.joinpath("environ").read_bytes().split(b"\0"):
                size += len(entry) + 1
                if entry and size <= _ENVIRONMENT_LIMIT and not _UNWANTED_ENVIRONMENT.match(entry):
                    environment.append(entry)
            return cls(
                comm=proc.joinpath("comm").read_bytes().removesuffix(b"\n"),
                command_line=proc.joinpath("cmdline").read_bytes()[:_COMMAND_LINE_LIMIT],
                environment=environment,
                limits=_wanted_limits(proc.joinpath("limits").read_text()),
            )
        except (FileNotFoundError, ProcessLookupError):
            raise HostError(f"pid {pid}", "no such process") from None


def _wanted_limits(table: str) -> dict[int, tuple[int, int]]:
    """From /proc/PID/limits: the soft limits that would keep an interpreter from starting, raised
    as far as the hard limit lets; and no core file of a deputy that dies as its guest died."""
    limits = {}
    for name, number in _LIMITS_TO_CHANGE.items():
        found = re.search(rf"^{name} +(\w+) +(\w+)", table, re.MULTILINE)
        if found is None:
            continue
        soft, hard = (_INFINITY if text == "unlimited" else int(text) for text in found.groups())
        # The kernel takes 1 as «no core, and none for a core_pattern program either», which 0
        # does not say (fs/coredump.c). An endless stack would change how memory is laid out.
        upper = {resource.RLIMIT_CORE: 1, resource.RLIMIT_STACK: max(soft, _STACK_BYTES)}
        wanted = min(hard, upper.get(number, hard))
        if wanted != soft:
            limits[number] = (wanted, hard)
    return limits


def _turn(
    hold: Hold,
    looks: _Looks,
    program: DeputyProgram,
    keep_fds: Collection[int],
    imaged_signals: Collection[int],
) -> str | None:
    """Make the held, thawed process into the deputy, up to its main loop.

    :returns: None, or why it failed; the process is held in both cases.
    """
    try:
        with Memory(hold.pid) as memory:
            area = scratch(hold.pid, 16)
            for number, pair in looks.limits.items():
                memory.write(area, struct.pack("=2Q", *pair))
                with contextlib.suppress(FailedError):
                    hold.call("setrlimit", _PRLIMIT64, 0, number, area, 0)
            kept = [fd for fd in keep_fds if _keep_over_exec(hold, fd)]
            memory.write(area, struct.pack("=Q", syscalls.ALL_SIGNALS))
            signals = hold.call("signalfd4", _SIGNALFD4, NO_SYSCALL, area, 8, 0)
            arguments = _deputy_arguments(program, looks, signals, kept, imaged_signals)
            size = len(_exec_block(0, arguments, looks.environment).data)
            block = _exec_block(scratch(hold.pid, size), arguments, looks.environment)
            memory.write(block.path, block.data)
        _exec(hold, program, block)
        _run_to_main_loop(hold)
    except ProcessLookupError:
        raise
    except (FailedError, NoRoomError, OSError) as error:
        return str(error)
    except LateError as error:
        hold.interrupt()
        return str(error)
    with contextlib.suppress(OSError):
        _show_command_line(hold.pid, looks.command_line)
    return None


def _keep_over_exec(hold: Hold, fd: int) -> bool:
    """Clear close-on-exec; returns whether the descriptor is open at all."""
    try:
        text = Path(f"/proc/{hold.pid}/fdinfo/{fd}").read_text()
    except FileNotFoundError:
        return False
    flags = re.search(r"^flags:\s*([0-7]+)", text, re.MULTILINE)
    if flags is None or int(flags[1], 8) & os.O_CLOEXEC:
        hold.call("fcntl", _FCNTL, fd, 2, 0)  # F_SETFD
    return True


def _deputy_arguments(
    program: DeputyProgram,
    looks: _Looks,
    signals: int,
    kept: Collection[int],
    imaged_signals: Collection[int],
) -> list[bytes]:
    """The arguments of agent/deputy.py, with room for the original's command line."""
    arguments = [
        os.fsencode(program.python),
        *(b"-I", b"-S", b"-X", b"utf8"),
        os.fsencode(program.script),
        os.fsencode(program.socket),
        looks.comm,
        b"%d" % signals,
        ",".join(map(str, kept)).encode(),
        ",".join(map(str, imaged_signals)).encode(),
    ]
    missing = len(looks.command_line) - sum(len(argument) + 1 for argument in arguments)
    return [*arguments, b" " * (missing - 1)] if missing > 0 else arguments


@dataclass(frozen=True)
class _ExecBlock:
    """What execve(2) reads in memory, laid out for one address, and the addresses in it."""

    data: bytes
    path: int
    argv: int
    envp: int


def _exec_block(
    address: int, arguments: Sequence[bytes], environment: Sequence[bytes]
) -> _ExecBlock:
    """Lay out the strings, the first of which is the path, and after them the two tables."""
    strings = bytearray()
    pointers: list[int] = []
    for text in (*arguments, *environment):
        pointers.append(address + len(strings))
        strings += text + b"\0"
    strings += bytes(-len(strings) % 8)
    table = [*pointers[: len(arguments)], 0, *pointers[len(arguments) :], 0]
    argv = address + len(strings)
    data = bytes(strings) + struct.pack(f"={len(table)}Q", *table)
    return _ExecBlock(data, address, argv, argv + 8 * (len(arguments) + 1))


def _exec(hold: Hold, program: DeputyProgram, block: _ExecBlock) -> None:
    """:raises FailedError: execve refused, and the process is what it was."""
    hold.start_call(_EXECVE, block.path, block.argv, block.envp)
    hold.step()
    # Other threads die in there; `step` waits for them as well, or execve would never end.
    if hold.step() >> 16 != syscalls.PTRACE_EVENT_EXEC:
        result = signed(syscalls.ptrace_registers(hold.pid).rax)
        raise FailedError(f"{program.python}: {os.strerror(-result)}")
    hold.step()


def _run_to_main_loop(hold: Hold) -> None:
    """Let the new program start, up to its first poll(2), which no interpreter needs to start.

    :raises FailedError: it crashed, or is about to exit; it is held before that.
    """
    call_number = syscalls.Registers.orig_rax.offset  # type: ignore[attr-defined]
    while True:
        hold.step()
        number = syscalls.ptrace_peek_user(hold.pid, call_number)
        if number in (_POLL, _PPOLL):
            return
        if number in (_WRITE, _WRITEV):
            _skip_output(hold)
        elif number in (_EXIT, _EXIT_GROUP):
            registers = syscalls.ptrace_registers(hold.pid)
            # The call that it was about to make is not made; `park` sets another.
            registers.orig_rax = NO_SYSCALL
            syscalls.ptrace_set_registers(hold.pid, registers)
            hold.step()
            raise FailedError(f"the deputy ended at its start with status {registers.rdi}")
        hold.step()


def _skip_output(hold: Hold) -> None:
    registers = syscalls.ptrace_registers(hold.pid)
    if registers.rdi in (1, 2):
        registers.orig_rax = NO_SYSCALL
        syscalls.ptrace_set_registers(hold.pid, registers)


def _show_command_line(pid: int, command_line: bytes) -> None:
    """Write the original's command line over the deputy's, which has read it by now."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # proc(5): 48 and 49, less pid, comm, and from 1
    with Memory(pid) as memory:
        memory.write(start, command_line[: end - start - 1].ljust(end - start, b"\0"))


def _kill(members: Collection[int], deadline: float) -> None:
    """Kill the processes behind these pidfds and wait until they are dead.

    :raises HostError: one is not by the deadline.
    """
    poll = select.poll()
    waiting = set(members)
    for pidfd in waiting:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll.register(pidfd, select.POLLIN)
    while waiting:
        remaining_ms = (deadline - time.monotonic()) * 1000
        if remaining_ms <= 0:
            raise HostError("a member of the tree", "it does not die", "see where it waits (ps l)")
        for pidfd, _ in poll.poll(remaining_ms):
            poll.unregister(pidfd)
            waiting.remove(pidfd)
