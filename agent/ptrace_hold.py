"""Holds all threads of a process by ptrace, frozen ones too, and has it make system calls. x86_64 only."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent import syscalls
from agent.process_memory import Memory, scratch, syscall_address
from migrate.errors import HostError

NO_SYSCALL = (1 << 64) - 1
"""Given to a tracee as its system call, it makes none."""

# Numbers of x86_64 (asm/unistd_64.h).
_RT_SIGACTION, _PAUSE = 13, 34
_CS_64_BIT = 0x33
_STOP_SIGNALS = {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_OPTIONS = syscalls.PTRACE_O_TRACESYSGOOD | syscalls.PTRACE_O_TRACEEXEC
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WAIT_SLICE_SECONDS = 0.05
_SECOND_CHANCE_SECONDS = 5


class GoneError(HostError):
    """The process died while it was held."""

    def __init__(self, pid: int) -> None:
        super().__init__(f"pid {pid}", "it died while it was to become a deputy")


class LateError(HostError):
    """The process did not come to its next stop by the deadline; it runs."""


class FailedError(Exception):
    """A step of the injection failed; the process is still held."""


@dataclass
class Hold:
    """A process all of whose threads this one holds by ptrace."""

    pid: int
    deadline: float
    """On the clock of time.monotonic, for the waits in here."""
    stopped: bool = False
    """It is in group-stop."""
    others: set[int] = field(default_factory=set)
    """The held threads but the leader."""
    leader_held: bool = False
    instruction: int | None = None
    """The address of a system call instruction in the program that it runs now."""

    def seize(self) -> None:
        """Stop every thread, frozen ones too: a trap goes before the freezer.

        :raises HostError: somebody else traces it, or a thread does not stop in time.
        """
        done: set[int] = set()
        while new := self._threads() - done:
            for tid in new:
                self._seize_thread(tid)
            done |= new
        if not self.leader_held:
            raise HostError(f"pid {self.pid}", "its main thread has ended")

    def _seize_thread(self, tid: int) -> None:
        try:
            syscalls.ptrace(syscalls.PTRACE_SEIZE, tid, 0, _OPTIONS)
        except OSError as error:
            tracer = self._tracer(tid)
            if tid != self.pid and tracer is None:
                return
            # An attempt before this one may have left a thread that did not stop in time.
            if tracer != os.getpid():
                reason = f"it cannot be held: {error.strerror}"
                raise HostError(f"pid {self.pid}", reason, "detach its debugger") from error
        if tid == self.pid:
            self.leader_held = True
        else:
            self.others.add(tid)
        with contextlib.suppress(ProcessLookupError):
            syscalls.ptrace(syscalls.PTRACE_INTERRUPT, tid)
        _, status = self.wait({tid})
        while tid in self.others | {self.pid} and status >> 16 != syscalls.PTRACE_EVENT_STOP:
            # A signal on its way to a process that was not frozen: back into the queue with it.
            with contextlib.suppress(ProcessLookupError):
                syscalls.tgkill(self.pid, tid, os.WSTOPSIG(status))
            syscalls.ptrace(syscalls.PTRACE_CONT, tid)
            _, status = self.wait({tid})

    def _threads(self) -> set[int]:
        try:
            return {int(task.name) for task in Path(f"/proc/{self.pid}/task").iterdir()}
        except FileNotFoundError:
            raise GoneError(self.pid) from None

    def _tracer(self, tid: int) -> int | None:
        """The pid of a thread's tracer, 0 for none; None if the thread is gone."""
        try:
            status = Path(f"/proc/{self.pid}/task/{tid}/status").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        found = re.search(r"^TracerPid:\s*(\d+)", status, re.MULTILINE)
        return int(found[1]) if found else 0

    def wait(self, tids: Collection[int] | None = None) -> tuple[int, int]:
        """Wait for the next stop of one of these threads (all if None); bury the dead.

        :returns: tid and wait status.
        :raises HostError: the deadline is past, or the process died.
        """
        while True:
            for tid in tids or {self.pid, *self.others}:
                try:
                    got, status = os.waitpid(tid, syscalls.WALL | os.WNOHANG)
                except ChildProcessError:
                    self._lost(tid)
                    if tids:
                        return tid, 0
                    continue
                if not got:
                    continue
                if not os.WIFSTOPPED(status):
                    self._lost(tid)
                elif tid == self.pid and status >> 16 == syscalls.PTRACE_EVENT_STOP:
                    self.stopped = os.WSTOPSIG(status) in _STOP_SIGNALS
                return tid, status
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise LateError(f"pid {self.pid}", "it did not stop in time")
            signal.sigtimedwait((signal.SIGCHLD,), min(remaining, _WAIT_SLICE_SECONDS))

    def _lost(self, tid: int) -> None:
        self.others.discard(tid)
        if tid == self.pid:
            self.leader_held = False
            raise GoneError(self.pid)

    def block_signals(self) -> None:
        """Block all that can be, in each thread."""
        for tid in {self.pid, *self.others}:
            syscalls.ptrace_set_signal_mask(tid, syscalls.ALL_SIGNALS)

    def require_64_bit(self) -> None:
        """:raises HostError: it runs 32-bit code, whose system calls have other numbers."""
        if syscalls.ptrace_registers(self.pid).cs != _CS_64_BIT:
            raise HostError(f"pid {self.pid}", "a 32-bit program cannot become a deputy")

    def require_parked(self) -> None:
        """:raises HostError: it is not where `park` leaves a process."""
        registers = syscalls.ptrace_registers(self.pid)
        if _PAUSE not in (registers.rax, registers.orig_rax):
            raise HostError(f"pid {self.pid}", "it is no mute deputy")

    def kill_with_tracer(self) -> None:
        """From now on the kernel kills it if this process dies."""
        options = _OPTIONS | syscalls.PTRACE_O_EXITKILL
        for tid in {self.pid, *self.others}:
            syscalls.ptrace(syscalls.PTRACE_SETOPTIONS, tid, 0, options)

    def start_call(self, number: int, *arguments: int, tid: int | None = None) -> None:
        """Set a thread to make this system call when it goes on."""
        tid = self.pid if tid is None else tid
        registers = syscalls.ptrace_registers(tid)
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(registers, name, value)
        registers.rax = number
        # No call is in progress any more that the kernel could restart.
        registers.orig_rax = NO_SYSCALL
        if self.instruction is None:
            self.instruction = syscall_address(self.pid)
        registers.rip = self.instruction
        syscalls.ptrace_set_registers(tid, registers)

    def step(self) -> int:
        """Let the leader run to its next stop at a system call or an event; returns the status.

        :raises FailedError: a signal came up that no mask holds back: it crashed.
        """
        deliver = 0
        while True:
            syscalls.ptrace(syscalls.PTRACE_SYSCALL, self.pid, 0, deliver)
            tid, status = self.wait()
            while tid != self.pid:
                tid, status = self.wait()
            number = os.WSTOPSIG(status)
            if status >> 16 == syscalls.PTRACE_EVENT_EXEC:
                self.instruction = None
                return status
            if number == _SYSCALL_STOP:
                return status
            if status >> 16 == syscalls.PTRACE_EVENT_STOP:
                deliver = 0
            elif number == signal.SIGSTOP:
                deliver = number
            else:
                raise FailedError(f"it got signal {number}")

    def call(self, what: str, number: int, *arguments: int) -> int:
        """Have the leader make a system call; returns the result.

        :raises FailedError: the call failed.
        """
        self.start_call(number, *arguments)
        self.step()
        self.step()
        result = signed(syscalls.ptrace_registers(self.pid).rax)
        if -4096 < result < 0:
            raise FailedError(f"{what}: {os.strerror(-result)}")
        return result

    def make_deadly(self, number: int) -> None:
        """Have signal `number` do what it does by default, as soon as the process goes on."""
        with Memory(self.pid) as memory:
            area = scratch(self.pid, 32)
            memory.write(area, bytes(32))  # a struct sigaction: SIG_DFL, no flags, no mask
        with contextlib.suppress(FailedError):
            self.call("rt_sigaction", _RT_SIGACTION, number, area, 0, 8)
        self.start_call(_PAUSE)
        syscalls.ptrace_set_signal_mask(
            self.pid, syscalls.ALL_SIGNALS & ~syscalls.signal_mask([number])
        )

    def park(self) -> None:
        """Leave every thread in pause(2) for good, nothing but SIGKILL ending it; let go."""
        for tid in sorted(self.others):
            self.start_call(_PAUSE, tid=tid)
        self.start_call(_PAUSE)
        self.block_signals()
        self.let_go()

    def let_go(self) -> None:
        """Detach from all that is held."""
        for tid in (*sorted(self.others), *([self.pid] if self.leader_held else [])):
            # ESRCH: killed meanwhile.
            with contextlib.suppress(ProcessLookupError):
                syscalls.ptrace(syscalls.PTRACE_DETACH, tid)
        self.others.clear()
        self.leader_held = False

    def interrupt(self) -> None:
        """Stop the leader once more, after a wait for it was in vain."""
        self.deadline = time.monotonic() + _SECOND_CHANCE_SECONDS
        syscalls.ptrace(syscalls.PTRACE_INTERRUPT, self.pid)
        while self.wait({self.pid})[1] >> 16 != syscalls.PTRACE_EVENT_STOP:
            syscalls.ptrace(syscalls.PTRACE_CONT, self.pid)

    def run_to_death(self) -> None:
        """Let it go on, under hold, so that even in group-stop it does; return when it is dead."""
        deliver = 0
        with contextlib.suppress(GoneError):
            while True:
                syscalls.ptrace(syscalls.PTRACE_CONT, self.pid, 0, deliver)
                tid, status = self.wait()
                while tid != self.pid:
                    tid, status = self.wait()
                is_event = status >> 16 == syscalls.PTRACE_EVENT_STOP
                deliver = 0 if is_event else os.WSTOPSIG(status)

    def bury(self) -> None:
        """Kill it. Its parent learns of its death when it is waited for here."""
        self.deadline = time.monotonic() + _SECOND_CHANCE_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(HostError):
            while self.leader_held:
                self.wait()


def signed(word: int) -> int:
    """A register's 64 bits as what a system call returns."""
    return word - (1 << 64) if word >> 63 else word


@contextlib.contextmanager
def child_signal_blocked() -> Iterator[None]:
    """Block SIGCHLD, to wait for it; the caller gets one for those that may have been eaten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    try:
        yield
    finally:
        os.kill(os.getpid(), signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
