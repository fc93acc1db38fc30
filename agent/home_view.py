"""The guest's end of the home view: sshfs, whose SFTP bytes travel over the lifeline."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

from agent import syscalls
from migrate.errors import HostError

SSHFS = "/usr/bin/sshfs"
# Caches that hide changes made at home are off: a stale size makes CRIU refuse a file, and worse.
OPTIONS = (
    "passive",
    "allow_other",
    "default_permissions",
    "dir_cache=no",
    "attr_timeout=0",
    "entry_timeout=0",
    "negative_timeout=0",
    "ac_attr_timeout=0",
    "sshfs_sync",
    "max_conns=1",
    "nosuid",
    "nodev",
    "fsname=home",
)


class HomeView:
    """A mounted view. The FUSE server lives outside the guest's cgroup and pid namespace."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(mode=0o700)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [SSHFS, "-f", "-o", ",".join(OPTIONS), "home:/", str(mountpoint)],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            except OSError:
                ours.close()
                raise HostError("sshfs", "is not installed", "install sshfs") from None
        self.socket = ours
        """the SFTP bytes, for a stream of the lifeline"""

    def mounted(self) -> bool:
        """Whether the view can be used; POLLPRI on /proc/self/mountinfo announces a change."""
        return f" {self.mountpoint} " in Path("/proc/self/mountinfo").read_text()

    @property
    def failed(self) -> bool:
        """Whether sshfs has given up."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it; files still open through it get errors."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            syscalls.umount(self.mountpoint, syscalls.MNT_DETACH)
        with contextlib.suppress(OSError):
            self.mountpoint.rmdir()
