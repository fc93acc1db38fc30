"""System calls that the standard library lacks, each thinly wrapped: errno becomes OSError.

Numbers and structures are those of Linux on x86_64 and, where they do not depend on registers,
aarch64. Constants carry the kernel's own names (`linux/ptrace.h`, `linux/sched.h`, `sys/mount.h`).
"""

import ctypes
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import HostError

PTRACE_PEEKUSER = 3
PTRACE_CONT = 7
PTRACE_SINGLESTEP = 9
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETEVENTMSG = 0x4201
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B

PTRACE_O_TRACESYSGOOD = 0x1
PTRACE_O_TRACEEXEC = 0x10
PTRACE_O_EXITKILL = 0x100000

PTRACE_EVENT_EXEC = 4
PTRACE_EVENT_STOP = 128

WALL = 0x40000000
"""waitpid option __WALL: also threads, which `os` does not name."""

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_PARENT = 0x00008000
_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_INTO_CGROUP = 0x200000000
_CLONE_CHILD_SETTID = 0x01000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
MOUNT_ATTR_NOSUID = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_TID_ADDRESS = 40

SFD_NONBLOCK = os.O_NONBLOCK
SFD_CLOEXEC = os.O_CLOEXEC

KCMP_FILE = 0
KCMP_VM = 1
KCMP_FILES = 2
KCMP_FS = 3
KCMP_SIGHAND = 4

SI_QUEUE = -1
ALL_SIGNALS = (1 << 64) - 1
"""A signal mask of the kernel (bit N-1 is signal N) with every bit set."""


@dataclass(frozen=True)
class _Numbers:
    """The system calls that are made by number, since not every libc in use wraps them."""

    ptrace: int
    rt_sigqueueinfo: int
    rt_tgsigqueueinfo: int
    kcmp: int
    ioprio_set: int
    clone3: int = 435
    pidfd_getfd: int = 438
    mount_setattr: int = 442


_NUMBERS = {
    "x86_64": _Numbers(
        ptrace=101, rt_sigqueueinfo=129, rt_tgsigqueueinfo=297, kcmp=312, ioprio_set=251
    ),
    "aarch64": _Numbers(
        ptrace=117, rt_sigqueueinfo=138, rt_tgsigqueueinfo=240, kcmp=272, ioprio_set=30
    ),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
# Variadic: without a type, an argument of more than 32 bits would be cut.
_libc.syscall.restype = _libc_with_gil.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.signalfd.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_libc.tee.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint]
_libc.tee.restype = ctypes.c_ssize_t


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86_64 (`sys/user.h`)."""

    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx"),
            *("rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
            *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    )
    rax: int
    rdi: int
    rsi: int
    rdx: int
    r10: int
    r8: int
    r9: int
    rip: int
    cs: int
    orig_rax: int


def _numbers() -> _Numbers:
    machine = os.uname().machine
    try:
        return _NUMBERS[machine]
    except KeyError:
        known = " and ".join(_NUMBERS)
        raise HostError(f"architecture {machine}", "not supported", f"use {known}") from None


def require_x86_64() -> None:
    """Refuse what works on registers anywhere but on x86_64.

    :raises HostError: on another architecture.
    """
    machine = os.uname().machine
    if machine != "x86_64":
        raise HostError(
            f"architecture {machine}", "processes cannot be made deputies here", "use x86_64"
        )


def _checked(result: object, name: str) -> int:
    value = int(result)  # type: ignore[call-overload]
    if value == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(value)


def _syscall(name: str, number: int, *arguments: int) -> int:
    words = (ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))
    return _checked(_libc.syscall(*words), name)


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    """ptrace(2) as the kernel has it; the caller's thread is the tracer."""
    return _syscall("ptrace", _numbers().ptrace, request, tid, address, data)


def ptrace_registers(tid: int) -> Registers:
    """The general registers of a stopped tracee (x86_64)."""
    registers = Registers()
    ptrace(PTRACE_GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def ptrace_set_registers(tid: int, registers: Registers) -> None:
    """Set the general registers of a stopped tracee (x86_64)."""
    ptrace(PTRACE_SETREGS, tid, 0, ctypes.addressof(registers))


def ptrace_signal_mask(tid: int) -> int:
    """The blocked signals of a stopped tracee; bit N-1 is signal N."""
    mask = ctypes.c_uint64()
    ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    return mask.value


def ptrace_set_signal_mask(tid: int, mask: int) -> None:
    """Block exactly these signals in a stopped tracee; KILL and STOP never are."""
    word = ctypes.c_uint64(mask)
    ptrace(PTRACE_SETSIGMASK, tid, 8, ctypes.addressof(word))


def ptrace_event_message(tid: int) -> int:
    """What belongs to the last ptrace event: a tid, an exit status."""
    message = ctypes.c_ulong()
    ptrace(PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(message))
    return message.value


def ptrace_peek_user(tid: int, offset: int) -> int:
    """One word of a stopped tracee's `struct user`, offset in bytes."""
    word = ctypes.c_ulong()
    ptrace(PTRACE_PEEKUSER, tid, offset, ctypes.addressof(word))
    return word.value


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate, close-on-exec, of another process's descriptor; needs ptrace rights on it."""
    return _syscall("pidfd_getfd", _numbers().pidfd_getfd, pidfd, fd, 0)


def setns(fd: int, namespaces: int = 0) -> None:
    """Enter the namespace behind `fd`, or the given ones of the process of a pidfd."""
    _checked(_libc.setns(fd, namespaces), "setns")


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* flags for new ones."""
    _checked(_libc.unshare(flags), "unshare")


class _CloneArguments(ctypes.Structure):
    """struct clone_args (`linux/sched.h`), version 2: with set_tid."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size"),
            *("tls", "set_tid", "set_tid_size", "cgroup"),
        )
    )


def fork_with_pid(pid: int | None, *, sibling: bool = False, cgroup: int | None = None) -> int:
    """Fork; the child gets `pid` in the pid namespace that this process's children are born in.

    Only for a process with one thread: libc's own fork handlers do not run.

    :param pid: the wanted pid, or None for any. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
    :param sibling: the child's parent is the caller's own parent (CLONE_PARENT).
    :param cgroup: an open version 2 directory to be born in, which costs nothing, where moving there
        costs the kernel a grace period (8 to 25 ms).
    :returns: 0 in the child, its pid (as the caller's namespace counts) in the parent.
    :raises FileExistsError: the pid is taken.
    """
    number = _numbers().clone3
    wanted = (ctypes.c_int * 1)(pid or 0)
    arguments = _CloneArguments(exit_signal=signal.SIGCHLD)
    if pid is not None:
        arguments.set_tid = ctypes.addressof(wanted)
        arguments.set_tid_size = 1
    if sibling:
        # The signal at its end is then the one of the caller's own end.
        arguments.flags |= _CLONE_PARENT
        arguments.exit_signal = 0
    if cgroup is not None:
        arguments.flags |= _CLONE_INTO_CGROUP
        arguments.cgroup = cgroup
    tid_address = _libc_tid_address()
    if tid_address:
        arguments.flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
        arguments.child_tid = tid_address
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    result = _libc_with_gil.syscall(
        ctypes.c_long(number), ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments))
    )
    if result == 0:
        api.PyOS_AfterFork_Child()
        return 0
    error = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if result < 0:
        raise OSError(error, f"clone3: {os.strerror(error)}")
    return int(result)


def _libc_tid_address() -> int:
    """Where libc caches the thread's id, 0 if the kernel does not say.

    A child made behind libc's back would go on using its parent's id in raise() and abort().
    """
    address = ctypes.c_ulong()
    try:
        prctl(PR_GET_TID_ADDRESS, ctypes.addressof(address))
    except OSError:
        return 0
    return address.value


def mount(source: str, target: Path, filesystem: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); empty strings stand for NULL."""

    def text(value: str) -> bytes | None:
        return os.fsencode(value) if value else None

    result = _libc.mount(text(source), os.fsencode(target), text(filesystem), flags, text(data))
    try:
        _checked(result, "mount")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None


def umount(target: Path, flags: int = 0) -> None:
    """umount2(2) with MNT_* and UMOUNT_* flags."""
    try:
        _checked(_libc.umount2(os.fsencode(target), flags), "umount2")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None


def mount_setattr(target: Path, attributes: int) -> None:
    """mount_setattr(2), Linux 5.12: set MOUNT_ATTR_* on a mount and all below it."""
    path = ctypes.create_string_buffer(os.fsencode(target))
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _syscall(
        "mount_setattr",
        _numbers().mount_setattr,
        _AT_FDCWD,
        ctypes.addressof(path),
        _AT_RECURSIVE,
        ctypes.addressof(wanted),
        ctypes.sizeof(wanted),
    )


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    _checked(_libc.pivot_root(os.fsencode(new), os.fsencode(old)), "pivot_root")


def prctl(option: int, argument: int = 0) -> int:
    """prctl(2) with one argument, a number or an address."""
    return _checked(_libc.prctl(option, argument, 0, 0, 0), "prctl")


def signalfd(mask: int, flags: int = SFD_CLOEXEC) -> int:
    """A descriptor that reads the reader's own pending signals.

    :param mask: bit N-1 is signal N; they should be blocked as well.
    """
    word = ctypes.c_uint64(mask)
    buffer = (ctypes.c_uint64 * 16)(word.value)
    return _checked(_libc.signalfd(-1, ctypes.addressof(buffer), flags), "signalfd")


def tgkill(pid: int, tid: int, number: int) -> None:
    """Send a signal to one thread."""
    _checked(_libc.tgkill(pid, tid, number), "tgkill")


def queue_signal(pid: int, number: int, value: int) -> None:
    """rt_sigqueueinfo(2): a signal with a value (64 bits) to a process, as from this one."""
    info = _signal_info(number, value)
    number_of_call = _numbers().rt_sigqueueinfo
    _syscall("rt_sigqueueinfo", number_of_call, pid, number, ctypes.addressof(info))


def queue_signal_to_thread(pid: int, tid: int, number: int, value: int) -> None:
    """rt_tgsigqueueinfo(2): a signal with a value (64 bits) to one thread, as from this process."""
    info = _signal_info(number, value)
    number_of_call = _numbers().rt_tgsigqueueinfo
    _syscall("rt_tgsigqueueinfo", number_of_call, pid, tid, number, ctypes.addressof(info))


def _signal_info(number: int, value: int) -> "ctypes.Array[ctypes.c_uint32]":
    """siginfo_t of 128 bytes as sigqueue(3) fills it: signo, errno, code, pad, pid, uid, value."""
    return (ctypes.c_uint32 * 32)(
        number,
        *(0, SI_QUEUE & 0xFFFFFFFF, 0),
        *(os.getpid(), os.getuid()),
        *(value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF),
    )


def tee(source: int, target: int, size: int, flags: int = 0) -> int:
    """Copy up to `size` bytes from pipe to pipe without consuming them; returns how many."""
    return _checked(_libc.tee(source, target, size, flags), "tee")


def kcmp(first: int, second: int, kind: int, index1: int = 0, index2: int = 0) -> int:
    """kcmp(2): 0 if two processes share the resource of KCMP_* kind, else an order, 1 to 3."""
    return _syscall("kcmp", _numbers().kcmp, first, second, kind, index1, index2)


def set_idle_io_priority() -> None:
    """ioprio_set(2): from now on this process's disk I/O waits for everybody else's."""
    process, idle_class = 1, 3 << 13
    _syscall("ioprio_set", _numbers().ioprio_set, process, 0, idle_class)


def signal_mask(numbers: Iterable[int]) -> int:
    """The kernel's mask for these signals."""
    mask = 0
    for number in numbers:
        mask |= 1 << (number - 1)
    return mask
