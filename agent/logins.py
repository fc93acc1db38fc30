"""Logins as PAM tells of them: the FIFO that the login hook (migrate/pam.py) writes a line into.

The hook never waits: where nobody reads, or the FIFO is full, the line is lost, and the login goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.peer_errors import one_line
from migrate import paths
from migrate.config import Config
from migrate.errors import HostError

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
"""All that a FIFO holds."""
_HERE = ("", "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Login:
    """A session that PAM has opened."""

    service: str
    user: str
    remote_host: str

    @classmethod
    def of(cls, line: str) -> Login | None:
        """What the hook has written; None if it makes no sense."""
        fields = [one_line(field, 64) for field in line.split("\t")]
        return cls(*fields) if len(fields) == 3 and fields[0] and fields[1] else None

    def counts(self, config: Config) -> bool:
        """Whether somebody is there who wants this host for himself."""
        if self.user == paths.PEER_USER:
            return False
        if self.service in config.login_services and self.remote_host in _HERE:
            return True
        remote = self.service in (*config.login_services, *config.remote_login_services)
        return config.remote_logins and remote


class LoginDoor:
    """Reads the FIFO in the running loop, from `start` to `close`."""

    def __init__(
        self,
        config: Callable[[], Config],
        on_login: Callable[[str], object],
        path: Path = paths.LOGIN_FIFO,
    ) -> None:
        """:param on_login: gets a reason for people, for each login that counts."""
        self._config = config
        self._on_login = on_login
        self._path = path
        self._fd = -1

    def start(self) -> None:
        """Listen. :raises HostError: there can be no FIFO."""
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISFIFO(self._path.lstat().st_mode):
                    self._path.unlink()
            with suppress(FileExistsError):
                os.mkfifo(self._path, 0o600)
            # For writing as well: so it never comes to its end.
            self._fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(str(self._path), f"cannot be made: {error.strerror}") from None
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Listen no longer."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)

    def _readable(self) -> None:
        with suppress(BlockingIOError):
            for line in os.read(self._fd, READ_BYTES).decode(errors="replace").splitlines():
                login = Login.of(line)
                if login is not None and login.counts(self._config()):
                    self._on_login(f"{login.user} has logged in ({login.service})")
