"""execve(2) as a shell does it: the search along PATH, scripts without a first line, and what to say.

:func:`execute` is the last thing that a process does before it is another program.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

NOT_EXECUTABLE = 126
NOT_FOUND = 127
DEFAULT_PATH = b"/usr/local/bin:/usr/bin:/bin"
SHELL = b"/bin/sh"
_ELF = b"\x7fELF"
_MACHINES = {
    3: "i386",
    8: "mips",
    21: "ppc64",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
}
_MACHINES[243] = "riscv"
_ELF_MACHINE_AT = 18
_LOOK_BYTES = 256


class Failure(msgspec.Struct, frozen=True):
    """Why a command was not executed, and the exit status that says so."""

    status: int
    what: str
    reason: str


def execute(file: bytes, arguments: Sequence[bytes], environment: Mapping[bytes, bytes]) -> Failure:
    """Become this program; returns only if that fails.

    :param file: searched along the PATH of `environment` unless it has a slash.
    """
    shown = os.fsdecode(file).encode(errors="replace").decode()
    if not file:
        return Failure(NOT_FOUND, "''", "command not found")
    if b"/" in file:
        return _explain(shown, file, _try(file, arguments, environment))
    denied: OSError | None = None
    for directory in environment.get(b"PATH", DEFAULT_PATH).split(b":"):
        path = (directory or b".") + b"/" + file
        error = _try(path, arguments, environment)
        if error.errno == errno.EACCES:
            denied = error
        elif error.errno not in (errno.ENOENT, errno.ENOTDIR) or _there(path):
            return _explain(shown, path, error)
    if denied is not None:
        return _explain(shown, file, denied)
    return Failure(NOT_FOUND, shown, "command not found")


def _try(path: bytes, arguments: Sequence[bytes], environment: Mapping[bytes, bytes]) -> OSError:
    try:
        os.execve(path, list(arguments), dict(environment))
    except OSError as error:
        if error.errno == errno.ENOEXEC and _is_text(path):
            try:
                os.execve(SHELL, [arguments[0], path, *arguments[1:]], dict(environment))
            except OSError as worse:
                return worse
        return error


def _is_text(path: bytes) -> bool:
    """Whether sh could make sense of it: no zero byte in what would be its first line."""
    return b"\0" not in _beginning(path).partition(b"\n")[0]


def _beginning(path: bytes) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_LOOK_BYTES)
    except OSError:
        return b"\0"


def _explain(shown: str, path: bytes, error: OSError) -> Failure:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if _there(path):
            return Failure(NOT_EXECUTABLE, shown, "its interpreter does not exist")
        return Failure(NOT_FOUND, shown, "no such file or directory")
    if error.errno == errno.ENOEXEC:
        return Failure(NOT_EXECUTABLE, shown, f"cannot be executed: {_kind(path)}")
    if error.errno == errno.EACCES and Path(os.fsdecode(path)).is_dir():
        return Failure(NOT_EXECUTABLE, shown, "is a directory")
    return Failure(NOT_EXECUTABLE, shown, os.strerror(error.errno or errno.EIO))


def _there(path: bytes) -> bool:
    return Path(os.fsdecode(path)).exists()


def _kind(path: bytes) -> str:
    start = _beginning(path)
    if not start.startswith(_ELF) or len(start) < _ELF_MACHINE_AT + 2:
        return "it is no program"
    order = "little" if start[5] == 1 else "big"
    number = int.from_bytes(start[_ELF_MACHINE_AT : _ELF_MACHINE_AT + 2], order)  # type: ignore[arg-type]
    machine = _MACHINES.get(number, f"machine {number}")
    return f"a program for {machine}, this host is {os.uname().machine}"
