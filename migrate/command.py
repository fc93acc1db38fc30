"""`migrate COMMAND`: this process asks for the command to be run elsewhere, and becomes its deputy.

Its descriptors go to migd with the request. Everything else about it (user, groups, limits, working
directory, …) home's guard asks the kernel, so that nobody can claim what is not so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from migrate import messages, paths
from migrate.errors import HostError, MigrateError, UserError
from migrate.framing import MALFORMED

NOT_EXECUTABLE = 126
NOT_FOUND = 127
MAX_REPLY = 1 << 17
TITLE_BYTES = 200
STDIO = (0, 1, 2)
NICEST = 19
"""Signals that Python ignores by itself, so that nothing tells how its parent had them."""
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True)
class Words:
    """What the command line says about a command."""

    arguments: Sequence[str]
    """the command with its arguments; empty: a shell"""
    host: str = ""
    host_id: int = 0
    file: str = ""
    """what to execute instead of arguments[0]"""
    background: bool = False
    low: bool = False
    local: bool = False
    verbose: bool = False
    debug: bool = False


@dataclass(frozen=True)
class _Standing:
    """What a deputy needs to stand."""

    starting: messages.Starting
    signal_fd: int


class _Here(Exception):
    """The host that was named is this one."""


def run(words: Words) -> NoReturn:
    """Run it; this process ends as the command ends.

    :raises MigrateError: nothing was run.
    """
    if words.background:
        _in_background(words)
    try:
        standing = _ask(words)
    except _Here as here:
        if words.verbose:
            print(f"migrate: running on {here}, which is this host", file=sys.stderr)
        _run_here(words)
    except MigrateError as error:
        if not words.local:
            raise
        if words.verbose or words.debug:
            print(f"migrate: running here: {error}", file=sys.stderr)
        _run_here(words)
    if words.verbose:
        print(f"migrate: running on {standing.starting.host}", file=sys.stderr)
    _stand(standing, words)


def _command(words: Words) -> messages.Command:
    arguments = [os.fsencode(word) for word in _arguments(words)]
    ignored = [
        number
        for number in range(1, signal.NSIG)
        if number not in _PYTHON_IGNORES
        and number not in (32, 33)
        and signal.getsignal(number) is signal.SIG_IGN
    ]
    return messages.Command(
        file=os.fsencode(words.file) or arguments[0],
        arguments=tuple(arguments),
        environment=tuple(b"%s=%s" % item for item in os.environb.items()),
        ignored_signals=tuple(ignored),
    )


def _arguments(words: Words) -> Sequence[str]:
    return words.arguments or [os.environ.get("SHELL") or "/bin/sh"]


def _ask(words: Words) -> _Standing:
    """Have it arranged. :raises MigrateError: the command will not be started."""
    started = time.monotonic()
    title = (
        " ".join(_arguments(words)).encode(errors="replace")[:TITLE_BYTES].decode(errors="ignore")
    )
    request = messages.RunCommand(words.host, words.host_id, words.low, title)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        description = _sealed(messages.encode(_command(words)))
        try:
            sock.connect(str(paths.RUN_SOCKET))
            socket.send_fds(sock, [messages.encode(request)], [description, *_stdio()])
        except OSError as error:
            raise HostError(
                "migd", f"cannot be reached ({error.strerror})", "start it: systemctl start migd"
            ) from None
        finally:
            os.close(description)
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, MAX_REPLY, 1)
                reply = messages.decode_reply(data) if data else None
            except (OSError, *MALFORMED) as error:
                raise HostError("migd", f"the connection broke ({error})") from None
            match reply:
                case messages.Progress(step):
                    if words.debug:
                        spent_ms = (time.monotonic() - started) * 1000
                        print(f"migrate: {step} ({spent_ms:.1f} ms)", file=sys.stderr)
                case messages.Starting():
                    return _Standing(reply, fds[0])
                case messages.Here(host):
                    raise _Here(host)
                case messages.Refused(obstacles) if obstacles:
                    first = obstacles[0]
                    raise MigrateError(first.what, first.reason, first.remedy)
                case _:
                    raise HostError("migd", "ended before it answered", "look into its log")


def _sealed(data: bytes) -> int:
    """A file in memory that nobody can change any more."""
    import fcntl

    fd = os.memfd_create("command", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(os.dup(fd), "wb") as file:
        file.write(data)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _stdio() -> tuple[int, ...]:
    """Its three descriptors; those that are closed are /dev/null from now on."""
    for fd in STDIO:
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(fd, True)
    return STDIO


def _stand(standing: _Standing, words: Words) -> NoReturn:
    """Become the deputy. Signals wait from here on until it reads them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    signal_fd = standing.signal_fd
    os.set_inheritable(signal_fd, True)
    name = os.path.basename(_arguments(words)[0])[:15]  # noqa: PTH119 (pathlib costs time)
    python = os.path.realpath(sys.executable)
    os.execv(
        python,
        [
            *(python, "-I", "-S", "-X", "utf8", standing.starting.program),
            *(standing.starting.socket, name, str(signal_fd), "0,1,2", ""),
        ],
    )


def _run_here(words: Words) -> NoReturn:
    """As if there were no `migrate`."""
    if words.low:
        os.nice(NICEST)
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    arguments = list(_arguments(words))
    file = words.file or arguments[0]
    for number in _PYTHON_IGNORES:
        signal.signal(number, signal.SIG_DFL)
    try:
        try:
            os.execvp(file, arguments)
        except OSError as error:
            if error.errno != 8:  # ENOEXEC: a script without its first line
                raise
            os.execv("/bin/sh", [arguments[0], _found(file), *arguments[1:]])
    except FileNotFoundError:
        print(f"migrate: {file}: not found", file=sys.stderr)
        os._exit(NOT_FOUND)
    except OSError as error:
        print(f"migrate: {file}: {error.strerror}", file=sys.stderr)
        os._exit(NOT_EXECUTABLE)


def _found(file: str) -> str:
    if "/" in file:
        return file
    for directory in os.get_exec_path():
        path = os.path.join(directory, file)  # noqa: PTH118 (pathlib costs time)
        if os.access(path, os.X_OK):
            return path
    return file


def _in_background(words: Words) -> None:
    """Return in a child that is the command's deputy; this process waits until it stands, and ends."""
    raise UserError("-b", "is not there yet")
