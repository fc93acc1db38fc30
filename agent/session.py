"""The session and group in which CRIU must stand, so that a guest finds its own numbers again.

CRIU (--shell-job) gives a root that leads no session the session of criu itself, and its group
unless the root leads that. So criu is started within a session and a group of the same numbers as
at home. Where the parent of the guest led the session, the keeper, which has the parent's pid, does
so here.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from functools import partial

from agent.link import TreeIds
from agent.reactor import READ, Reactor
from agent.syscalls import fork_with_pid
from agent.waiting import wait_for
from migrate.errors import HostError

_PIDS = struct.Struct("=ii")
_SECONDS = 5.0

Fork = Callable[[], int]


def spawn_in_session(
    ids: TreeIds,
    spawn: Callable[[Fork], int],
    reactor: Reactor,
    pid: int | None = None,
    cgroup: int | None = None,
) -> tuple[int, tuple[int, ...]]:
    """Start criu as a child of the caller, in the session and group that `ids` name.

    :param spawn: forks with the function it is given, and returns the child's pid.
    :param pid: which one the child gets; None: any.
    :param cgroup: the directory of the one it is born in; None: the caller's.
    :returns: criu's pid, and processes of the caller that only hold the numbers: kill them
        afterwards.
    """
    born = partial(fork_with_pid, pid, cgroup=cgroup)
    if ids.sid == ids.pid:
        return spawn(born), ()
    if ids.sid == os.getpid():
        if os.getsid(0) != ids.sid:
            os.setsid()
        if ids.pgid in (ids.pid, ids.sid):
            return spawn(born), ()
        group = _hold(ids.pgid, lambda: os.setpgid(0, 0), reactor)
        return spawn(lambda: _fork_into(group, born)), (group,)
    reading, writing = os.pipe()
    leader = fork_with_pid(ids.sid)
    if leader == 0:
        _lead(ids, spawn, writing, born)
    os.close(writing)
    try:
        if not wait_for(reactor, reading, READ, _SECONDS):
            raise HostError("session", "could not be made")
        data = os.read(reading, _PIDS.size)
    finally:
        os.close(reading)
    if len(data) < _PIDS.size:
        raise HostError("session", "could not be made")
    criu, group = _PIDS.unpack(data)
    return criu, (leader, group) if group else (leader,)


def _fork_into(group: int, born: Fork) -> int:
    pid = born()
    if pid == 0:
        os.setpgid(0, group)
    return pid


def _hold(pid: int, become: Callable[[], None], reactor: Reactor) -> int:
    """A child with this pid that does `become` and then only waits to be killed."""
    reading, writing = os.pipe()
    child = fork_with_pid(pid)
    if child == 0:
        try:
            become()
            os.write(writing, b".")
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        wait_for(reactor, reading, READ, _SECONDS)
    finally:
        os.close(reading)
    return child


def _lead(
    ids: TreeIds, spawn: Callable[[Fork], int], writing: int, born: Callable[..., int]
) -> None:
    """The child that leads the session: starts criu beside itself, tells, waits to be killed."""
    try:
        os.setsid()
        group = 0
        if ids.pgid not in (ids.pid, ids.sid):
            group = fork_with_pid(ids.pgid, sibling=True)
            if group == 0:
                os.setpgid(0, 0)
                while True:
                    signal.pause()
            os.setpgid(group, group)

        def fork() -> int:
            pid = born(sibling=True)
            if pid == 0 and group:
                os.setpgid(0, group)
            return pid

        criu = spawn(fork)
        os.write(writing, _PIDS.pack(criu, group))
        while True:
            signal.pause()
    finally:
        os._exit(1)
