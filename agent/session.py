"""The session and group in which CRIU must stand, so that a guest finds its own numbers again.

CRIU (--shell-job) gives a root that leads no session the session of criu itself, and its group
unless the root leads that. So criu is started within a session and a group of the same numbers as
at home. The keeper, which has the pid of the guest's parent, is in that session: it leads it where
the parent did, else it is forked by a process that leads it here. (A guest whose parent is in no
session of its own ignores ^Z: its group is orphaned.)
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from agent.link import TreeIds
from agent.reactor import READ, Reactor
from agent.syscalls import PR_SET_PDEATHSIG, fork_with_pid, prctl
from agent.waiting import wait_for
from agent.wire import nothing
from migrate.errors import HostError

_PIDS = struct.Struct("=ii")
_SECONDS = 5.0

Fork = Callable[[], int]


def fork_parent(ids: TreeIds, lead: Callable[[], None]) -> int:
    """Fork the process that is to be the guest's parent, with that pid and in that session.

    :param lead: is called in the leader of the session (if that is not in the guest's tree).
    :returns: 0 in that process; in the caller the pid to wait for, which ends as that one ends.
    """
    # The init of the pid namespace must come first, so it cannot be in anybody's session.
    if ids.ppid <= 1 or ids.sid in (ids.pid, ids.ppid):
        pid = fork_with_pid(max(ids.ppid, 1))
        if pid == 0 and ids.ppid > 1 and ids.sid == ids.ppid:
            os.setsid()
            lead()
        return pid
    leader = fork_with_pid(ids.sid)
    if leader:
        return leader
    parent = -1
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        lead()
        parent = fork_with_pid(ids.ppid)
        if parent == 0 and ids.pgid == ids.ppid:
            os.setpgid(0, 0)
    finally:
        if parent:
            _outlive(parent)
    return 0


def _outlive(child: int) -> NoReturn:
    """Lead the session until the child has ended, and end as it did (1 if there is none)."""
    try:
        # The view must end with the child, so nobody else may hold its socket.
        _close_all()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(min(abs(status), 255))
    finally:
        os._exit(1)


def spawn_in_session(
    ids: TreeIds,
    spawn: Callable[[Fork], int],
    reactor: Reactor,
    pid: int | None = None,
    cgroup: int | None = None,
    lead: Callable[[], None] = nothing,
) -> tuple[int, tuple[int, ...]]:
    """Start criu as a child of the caller, in the session and group that `ids` name.

    :param spawn: forks with the function it is given, and returns the child's pid.
    :param pid: which one the child gets; None: any.
    :param cgroup: the directory of the one it is born in; None: the caller's.
    :param lead: is called in the leader of a session that is made only now.
    :returns: criu's pid, and processes of the caller that only hold the numbers: kill them
        afterwards, unless the session has a terminal, which would be hung up.
    """
    born = partial(fork_with_pid, pid, cgroup=cgroup)
    if ids.sid == ids.pid:
        return spawn(born), ()
    if ids.sid == os.getsid(0):
        if ids.pgid in (ids.pid, os.getpgrp()):
            return spawn(born), ()
        if ids.pgid == ids.sid:
            return spawn(lambda: _fork_into(ids.sid, born)), ()
        group = _hold(ids.pgid, lambda: os.setpgid(0, 0), reactor)
        return spawn(lambda: _fork_into(group, born)), (group,)
    reading, writing = os.pipe()
    leader = fork_with_pid(ids.sid)
    if leader == 0:
        _lead(ids, spawn, writing, born, lead)
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
            _close_all()
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
    ids: TreeIds,
    spawn: Callable[[Fork], int],
    writing: int,
    born: Callable[..., int],
    lead: Callable[[], None],
) -> None:
    """The child that leads the session: starts criu beside itself, tells, waits to be killed."""
    try:
        os.setsid()
        lead()
        group = 0
        if ids.pgid not in (ids.pid, ids.sid):
            group = fork_with_pid(ids.pgid, sibling=True)
            if group == 0:
                _close_all()
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
        _close_all()
        while True:
            signal.pause()
    finally:
        os._exit(1)


def _close_all() -> None:
    """All but stdio: a process that only holds a number must hold nothing else."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
