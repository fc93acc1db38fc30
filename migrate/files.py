"""Files of the system, changed as a whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from migrate.errors import HostError


def write_file(path: Path, text: str, mode: int) -> bool:
    """Make `path` hold `text`, with `mode`; a reader sees the old text or the new, never half.

    :returns: whether anything had to be written.
    :raises HostError: it cannot be.
    """
    try:
        if path.is_file() and not path.is_symlink() and path.read_text() == text:
            path.chmod(mode)
            return False
    except (OSError, UnicodeDecodeError):
        pass  # Whatever it is, it is replaced.
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "w") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            fresh.rename(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise HostError(str(path), f"cannot be written: {error.strerror}") from error
    return True


def make_directory(path: Path, mode: int) -> None:
    """Make the directory if it is not there, and give it `mode`.

    :raises HostError: it cannot be made, or something else stands there.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        if path.is_symlink():
            raise HostError(str(path), "is a symbolic link", "put a directory there")
        path.chmod(mode)
    except OSError as error:
        raise HostError(str(path), f"cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one program at a time changes the files below `directory`.

    :raises HostError: it cannot be opened.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(str(directory), f"cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
