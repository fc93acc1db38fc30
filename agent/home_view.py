"""The guest's end of the home view: sshfs, whose SFTP bytes travel over the lifeline.

sshfs reads what another host sends, so it has the guest's owner's rights and no more: the keeper opens
the FUSE device and mounts it, and hands sshfs the descriptor (fuse3: a mount point of /dev/fd/N).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

from agent import syscalls
from agent.link import Owner
from agent.syscalls import MNT_DETACH, MS_NODEV, MS_NOSUID
from criu_hooks.statx import statx
from migrate.errors import HostError

SSHFS = Path("/usr/bin/sshfs")
# Caches that hide changes made at home are off: a stale size makes CRIU refuse a file, and worse.
OPTIONS = (
    "passive",
    "dir_cache=no",
    "attr_timeout=0",
    "entry_timeout=0",
    "negative_timeout=0",
    "ac_attr_timeout=0",
    "sshfs_sync",
    "max_conns=1",
)
LINKS_OPTION = "no_contain_symlinks"
"""Debian's sshfs refuses links that lead out of the mount, but the guest sees home's whole root."""


class HomeView:
    """A mounted view. The FUSE server lives outside the guest's cgroup and pid namespace."""

    def __init__(self, mountpoint: Path, owner: Owner) -> None:
        self.mountpoint = mountpoint
        mountpoint.mkdir(mode=0o700)
        ours, theirs = socket.socketpair()
        try:
            device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(
                "/dev/fuse", f"cannot be opened: {error.strerror}", "load the kernel module fuse"
            ) from None
        with theirs:
            try:
                mode = stat.S_IFDIR
                data = f"fd={device},rootmode={mode:o},user_id={owner.uid},group_id={owner.gid}"
                data += ",allow_other,default_permissions"
                syscalls.mount("home", mountpoint, "fuse.sshfs", MS_NOSUID | MS_NODEV, data)
                self._process = subprocess.Popen(
                    [SSHFS, "-f", "-o", ",".join(_options()), "home:/", f"/dev/fd/{device}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    pass_fds=(device,),
                    cwd="/",
                    env={"PATH": "/usr/bin:/bin"},
                    user=owner.uid,
                    group=owner.gid,
                    extra_groups=[],
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                self._unmount()
                raise HostError(
                    "sshfs", f"cannot be started: {error.strerror}", "install sshfs"
                ) from None
            finally:
                os.close(device)
        self.socket = ours
        """the SFTP bytes, for a stream of the lifeline"""

    @property
    def device(self) -> int:
        """Where its files lie, as st_dev. The server is not asked."""
        return statx(str(self.mountpoint)).device

    @property
    def failed(self) -> bool:
        """Whether sshfs has given up."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End it; files still open through it get errors."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._unmount()

    def _unmount(self) -> None:
        with contextlib.suppress(OSError):
            syscalls.umount(self.mountpoint, MNT_DETACH)
        with contextlib.suppress(OSError):
            self.mountpoint.rmdir()


def _options() -> tuple[str, ...]:
    """Those that this host's sshfs knows: it does not start with others."""
    known = LINKS_OPTION.encode() in SSHFS.read_bytes()
    return (*OPTIONS, LINKS_OPTION) if known else OPTIONS
