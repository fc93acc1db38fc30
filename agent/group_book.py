"""Which process of this host is in which group: kept while migd runs, and in a file over its restarts.

A group is a number that processes share. The file is in /run: a reboot clears it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from agent.group_words import Group, Identity
from criu_hooks.proc import pid_starttime
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

_SLACK = 256
"""processes that may have ended before those that have are forgotten"""


class _Member(msgspec.Struct, frozen=True, array_like=True):
    process: Identity
    group: Group


class _File(msgspec.Struct, frozen=True):
    members: tuple[_Member, ...] = ()
    settled: tuple[str, ...] = ()


def _order(item: tuple[Identity, int]) -> tuple[int, int]:
    return item[0].pid, item[0].starttime_ticks


def is_there(process: Identity) -> bool:
    """Whether a process has not ended."""
    try:
        return pid_starttime(process.pid) == process.starttime_ticks
    except (OSError, ValueError):
        return False


class GroupBook:
    """All groups of this host. What is not in it is in group 0."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = _File()
        try:
            kept = msgspec.msgpack.decode(path.read_bytes(), type=_File)
        except FileNotFoundError:
            pass
        except (OSError, *MALFORMED) as error:
            log.error("%s: the groups of processes are lost: %s", path, error)
        self._groups = {member.process: member.group for member in kept.members}
        self._settled = set(kept.settled)
        self._forget_at = 0
        self._forget()

    def group(self, process: Identity) -> int:
        """The number of its group; 0: none."""
        return self._groups.get(process, 0)

    def put(self, groups: dict[Identity, int]) -> None:
        """Let processes join groups, or (0) leave theirs. On file when it returns."""
        changed = False
        for process, group in groups.items():
            if self.group(process) != group:
                changed = True
                self._groups[process] = group
                if not group:
                    del self._groups[process]
        if changed:
            self._save()

    def members(self, group: int = 0) -> list[tuple[Identity, int]]:
        """The processes of a group, or of all groups, with its number, by pid."""
        return [item for item in self.noted(group) if is_there(item[0])]

    def noted(self, group: int = 0, after: int = 0) -> list[tuple[Identity, int]]:
        """As `members`, with those that may have ended, and only pids above `after`."""
        found = [item for item in self._groups.items() if group in (0, item[1])]
        return sorted((item for item in found if item[0].pid > after), key=_order)

    def settle(self, transaction: str, groups: dict[Identity, int]) -> None:
        """The processes that a guest has brought; each transaction counts once."""
        if transaction not in self._settled:
            self._settled.add(transaction)
            self._groups.update(groups)
            self._save()

    def is_settled(self, transaction: str) -> bool:
        """Whether what a guest has brought by this transaction is in here."""
        return transaction in self._settled

    def unsettle(self, transaction: str) -> None:
        """Forget a transaction whose guest has gone."""
        if transaction in self._settled:
            self._settled.discard(transaction)
            self._save()

    def _forget(self) -> None:
        self._groups = {p: group for p, group in self._groups.items() if is_there(p)}
        self._forget_at = 2 * len(self._groups) + _SLACK

    def _save(self) -> None:
        if len(self._groups) > self._forget_at:
            self._forget()
        file = _File(tuple(map(_Member, self._groups, self._groups.values())), tuple(self._settled))
        new = self._path.with_name(f"{self._path.name}.new")
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as out:
            out.write(msgspec.msgpack.encode(file))
        new.replace(self._path)
