"""The few system calls that Python 3.11 does not offer: mount, pivot_root, unshare, setns."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

# <linux/mount.h>
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

# <linux/sched.h>
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
NODE_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(
    source: str, target: Path | str, fstype: str = "", flags: int = 0, data: str = ""
) -> None:
    """mount(2). :raises OSError: with the target in its text."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {fstype or source} on {target}")


def bind(source: Path | str, target: Path | str, *, read_only: bool = False) -> None:
    """Show `source` at `target` as well."""
    mount(str(source), target, flags=MS_BIND)
    if read_only:
        mount(str(source), target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def mount_overlay(target: Path, lower: list[Path], upper: Path, work: Path) -> None:
    """:param lower: the layers, the topmost first."""
    layers = ":".join(str(layer) for layer in lower)
    mount("overlay", target, "overlay", 0, f"lowerdir={layers},upperdir={upper},workdir={work}")


def make_mounts_private() -> None:
    """Let nothing mounted from now on be seen by other mount namespaces."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)


def pivot_root(new_root: Path) -> None:
    """Make `new_root`, a mount point, the root of this mount namespace; the old one is gone."""
    os.chdir(new_root)
    _check(_libc.pivot_root(b".", b"."), f"pivot_root {new_root}")
    _check(_libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")


def unshare(flags: int) -> None:
    """unshare(2): new namespaces for this process (a new pid namespace for its children)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """setns(2) with a pidfd: enter all the namespaces in `flags` of that process."""
    _check(_libc.setns(fd, flags), "setns")


def sethostname(name: str) -> None:
    """Name this UTS namespace."""
    raw = name.encode()
    _check(_libc.sethostname(raw, ctypes.c_size_t(len(raw))), "sethostname")


def die_with_parent() -> None:
    """Have this process killed when its parent ends."""
    _check(_libc.prctl(1, ctypes.c_ulong(signal.SIGKILL)), "prctl PR_SET_PDEATHSIG")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the umask for the block."""
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)
