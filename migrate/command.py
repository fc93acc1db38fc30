"""`migrate COMMAND`: this process asks for the command to be run elsewhere, and becomes its deputy.

Its descriptors go to migd with the request. Everything else about it (user, groups, limits, working
directory, …) home's guard asks the kernel, so that nobody can claim what is not so.

As fast as an interpreter starts: see migrate.command_wire for what is imported, and why so little.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
from time import monotonic

from migrate.command_wire import MAX_REPLY, RUN_SOCKET, Command, Reply, Request
from migrate.errors import HostError, MigrateError
from migrate.reaching import reach_migd

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

NOT_EXECUTABLE = 126
NOT_FOUND = 127
ENOEXEC = 8
NICEST = 19
_STDIO = (0, 1, 2)
_INT_BYTES = 4
_PYTHON_IGNORES = (_signal.SIGPIPE, _signal.SIGXFSZ)
"""Signals that Python ignores by itself, so that nothing tells how its parent had them."""


class Words:
    """What the command line says about a command."""

    def __init__(
        self,
        arguments: Sequence[str] = (),
        host: str = "",
        host_id: int = 0,
        file: str = "",
        background: bool = False,
        low: bool = False,
        local: bool = False,
        verbose: bool = False,
        debug: bool = False,
    ) -> None:
        """
        :param arguments: the command with its arguments; empty: a shell.
        :param file: what to execute instead of arguments[0].
        """
        self.host = host
        self.host_id = host_id
        if arguments:
            self.arguments = tuple(arguments)
            self.file = file or arguments[0]
        else:
            self.file = os.environ.get("SHELL") or "/bin/sh"
            self.arguments = ("-" + self.file.rpartition("/")[2],)  # so a shell logs in
        self.background = background
        self.low = low
        self.local = local
        self.verbose = verbose
        self.debug = debug


class _RunHere(Exception):
    """The host that was named is this one."""


def run(words: Words) -> NoReturn:
    """Run it; this process ends as the command ends.

    :raises MigrateError: nothing was run.
    """
    _open_stdio()
    report = _in_background() if words.background else None
    try:
        starting, signal_fd = _ask(words)
    except _RunHere as here:
        if words.verbose or words.debug:
            _say(f"running on {here}, which is this host")
        _tell_parent(report, None)
        _run_here(words)
    except MigrateError as error:
        if not words.local:
            _tell_parent(report, error)
            raise
        if words.verbose or words.debug:
            _say(f"running on this host: {error}")
        _tell_parent(report, None)
        _run_here(words)
    host, address, program = starting.fields
    if words.verbose:
        _say(f"running on {host}")
    _tell_parent(report, None)
    _stand(address, program, signal_fd, words)


# ---------------------------------------------------------------------- asking


def _ask(words: Words) -> tuple[Reply, int]:
    """Have it arranged; returns what a deputy needs to stand.

    :raises MigrateError: the command will not be started.
    """
    started = monotonic()
    request = Request(words.host, words.host_id, words.low, " ".join(words.arguments))
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        _send(sock, request, words)
        while True:
            room = _socket.CMSG_SPACE(_INT_BYTES)
            data, rights, _, _ = sock.recvmsg(MAX_REPLY, room, _socket.MSG_CMSG_CLOEXEC)
            reply = Reply.decode(data)
            if reply.word == "progress":
                if words.debug:
                    _say(f"{reply.fields[0]} ({(monotonic() - started) * 1000:.1f} ms)")
            elif reply.word == "starting":
                return reply, int.from_bytes(rights[0][2][:_INT_BYTES], sys.byteorder)
            elif reply.word == "here":
                raise _RunHere(*reply.fields)
            elif reply.word == "refused":
                raise MigrateError(*reply.fields)
            else:
                raise HostError("migd", "ended before it answered", "look into its log")
    except OSError as error:
        raise HostError("migd", f"the connection broke ({error.strerror})") from None
    finally:
        sock.close()


def _send(sock: _socket.socket, request: Request, words: Words) -> None:
    packet = request.encode()
    description = _sealed(_command(words).encode())
    try:
        reach_migd(sock, RUN_SOCKET)
        fds = b"".join(fd.to_bytes(_INT_BYTES, sys.byteorder) for fd in (description, *_STDIO))
        sock.sendmsg([packet], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
    except OSError as error:
        raise HostError(
            "migd", f"cannot be reached ({error.strerror})", "start it: systemctl start migd"
        ) from None
    finally:
        os.close(description)


def _command(words: Words) -> Command:
    ignored = [
        number
        for number in _signal.valid_signals()
        if number not in _PYTHON_IGNORES and _signal.getsignal(number) == _signal.SIG_IGN
    ]
    return Command(
        file=os.fsencode(words.file),
        arguments=tuple(map(os.fsencode, words.arguments)),
        environment=tuple(b"%s=%s" % item for item in os.environb.items()),
        ignored_signals=tuple(ignored),
    )


def _sealed(data: bytes) -> int:
    """A file in memory that nobody can change any more."""
    import fcntl

    fd = os.memfd_create("command", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _open_stdio() -> None:
    """Those of the three descriptors that are closed are /dev/null from now on."""
    for fd in _STDIO:
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)  # the lowest number: this


# ---------------------------------------------------------------------- becoming


def _stand(address: str, program: str, signal_fd: int, words: Words) -> NoReturn:
    """Become the deputy. Signals wait from here on until it reads them."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, _signal.valid_signals())
    os.set_inheritable(signal_fd, True)
    name = words.arguments[0].rpartition("/")[2][:15]
    python = os.path.realpath(sys.executable)
    options = ("-I", "-S", "-X", "utf8")
    os.execv(python, [python, *options, program, address, name, str(signal_fd), "0,1,2", ""])


def _run_here(words: Words) -> NoReturn:
    """As if there were no `migrate`."""
    if words.low:
        os.nice(NICEST)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    for number in _PYTHON_IGNORES:
        _signal.signal(number, _signal.SIG_DFL)
    try:
        try:
            os.execvp(words.file, words.arguments)
        except OSError as error:
            if error.errno != ENOEXEC:
                raise
            script = (words.arguments[0], _found(words.file), *words.arguments[1:])
            os.execv("/bin/sh", script)
    except FileNotFoundError:
        _say(f"{words.file}: command not found")
        os._exit(NOT_FOUND)
    except OSError as error:
        _say(f"{words.file}: {error.strerror}")
        os._exit(NOT_EXECUTABLE)


def _found(file: str) -> str:
    if "/" not in file:
        for directory in os.get_exec_path():
            path = f"{directory or '.'}/{file}"
            if os.access(path, os.X_OK):
                return path
    return file


def _say(text: str) -> None:
    os.write(2, f"migrate: {text}\n".encode(errors="replace"))


# ---------------------------------------------------------------------- -b


def _in_background() -> int:
    """Return in a child of init's; this process tells how that fares, and ends.

    :returns: where the child tells that (`_tell_parent`).
    """
    reading, writing = os.pipe()
    orphaned, between = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.close(between)
        os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            told = pipe.read()
        if told:
            print(told.decode(), flush=True)
        os._exit(0 if told else 125)  # the child has said why
    if os.fork():
        os._exit(0)
    os.close(reading)
    os.close(between)
    os.read(orphaned, 1)  # its end: the process between has ended, init is our parent
    os.close(orphaned)
    os.setsid()  # no terminal's end is its end
    if os.isatty(0):
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.close(null)
    return writing


def _tell_parent(report: int | None, error: MigrateError | None) -> None:
    if report is not None:
        if error is None:
            os.write(report, f"{os.getpid():#x}".encode())
        os.close(report)
