"""The capsule: the namespaces that a guest lives in.

The pid namespace gives it its old pid whatever is taken outside; the mount namespace shows home's
files where a user expects them; uts shows home's host name; ipc keeps its System V objects apart.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from agent import syscalls
from agent.capsule_root import SHM_OPTIONS, RootPlan, lay
from agent.fd_passing import close_all_but
from agent.reactor import READ, Reactor
from agent.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
)
from agent.waiting import wait_for
from migrate.errors import HostError

BUILD_SECONDS = 20.0


@dataclass(frozen=True)
class Capsule:
    """Handles of a capsule that stands. The pid namespace is the keeper's own."""

    mount_fd: int
    uts_fd: int
    ipc_fd: int
    proc_fd: int
    """the capsule's /proc, as a directory descriptor"""

    def enter(self) -> None:
        """Move the calling (single-threaded) process inside."""
        syscalls.setns(self.ipc_fd)
        syscalls.setns(self.uts_fd)
        syscalls.setns(self.mount_fd)

    def close(self) -> None:
        """Let go of it; it ends with its last process."""
        for fd in (self.mount_fd, self.uts_fd, self.ipc_fd, self.proc_fd):
            os.close(fd)


def build(
    reactor: Reactor, hostname: str, plan: RootPlan | None, new_root: Path, devpts: Path
) -> Capsule:
    """Make a capsule; the caller lives in the new pid namespace already.

    :param reactor: goes on turning meanwhile.
    :param plan: what comes from home; None at home itself.
    :param new_root: an empty directory to build the capsule's root on.
    :param devpts: where the guest's own instance of devpts is mounted.
    :raises HostError: with the step that failed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            _inside(theirs, hostname, plan, new_root, devpts)
        theirs.close()
        try:
            # The view that is mounted there is served by this very process.
            if not wait_for(reactor, ours.fileno(), READ, BUILD_SECONDS):
                raise HostError("capsule", "could not be built in time")
            word, fds, _, _ = socket.recv_fds(ours, 4096, 4)
            if len(fds) == 4:
                return Capsule(*fds)
            raise HostError("capsule", word.decode(errors="replace") or "could not be built")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _inside(
    report: socket.socket, hostname: str, plan: RootPlan | None, new_root: Path, devpts: Path
) -> None:
    """The builder: a child that sets everything up, hands over handles, and ends."""
    status = 1
    step = "namespaces"
    try:
        # The view must end when the keeper wants it to, so nobody else may hold its socket.
        close_all_but(report.fileno())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        syscalls.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
        syscalls.mount("", Path("/"), flags=MS_REC | MS_SLAVE)
        step = f"host name {hostname}"
        socket.sethostname(hostname)
        step = "/dev/pts"
        syscalls.mount(str(devpts), Path("/dev/pts"), flags=MS_BIND)
        if plan is None:
            step = "/proc"
            syscalls.mount("proc", Path("/proc"), "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
            step = "/dev/shm"
            if Path("/dev/shm").is_dir():
                syscalls.mount(
                    "tmpfs", Path("/dev/shm"), "tmpfs", MS_NOSUID | MS_NODEV, SHM_OPTIONS
                )
        else:
            step = "root directory"
            lay(plan, new_root)
        names = ("/proc/self/ns/mnt", "/proc/self/ns/uts", "/proc/self/ns/ipc")
        fds = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in names]
        fds.append(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        socket.send_fds(report, [b"fds"], fds)
        status = 0
    except HostError as error:
        with contextlib.suppress(OSError):
            report.send(str(error).encode())
    except OSError as error:
        what = f"{step}: {error.filename}" if error.filename else step
        with contextlib.suppress(OSError):
            report.send(f"{what}: {error.strerror}".encode())
    finally:
        os._exit(status)
