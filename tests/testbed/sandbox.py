"""Run a command inside image layers: a chroot on an overlay, in namespaces that die with it.

As a program: ``python3 -m testbed.sandbox SPEC``, JSON of Sandbox's fields and the command.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from testbed import kernel
from testbed.errors import TestbedError

_PACKAGES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sandbox:
    """Layers to run a command in. What it writes stays in `upper`.

    :param lower: layers, the topmost first; may be empty: then `upper` is a whole root.
    :param upper: the directory that takes what is written.
    :param scratch: a directory on the same file system for the overlay's own use.
    :param binds: directories and files of the machine to show inside, read-only: (outside, inside).
    """

    upper: str
    scratch: str
    lower: list[str] = field(default_factory=list)
    binds: list[tuple[str, str]] = field(default_factory=list)

    def run(self, command: list[str]) -> str:
        """Run `command` as root inside. :return: its output. :raises TestbedError: if it fails."""
        spec = json.dumps({**asdict(self), "command": command})
        done = subprocess.run(
            [sys.executable, "-S", "-m", "testbed.sandbox", spec],
            env={"PYTHONPATH": str(_PACKAGES), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-25:])
            raise TestbedError(f"a step in the image failed ({done.returncode}):\n{tail}")
        return done.stdout


def run_in_image(command: str, *arguments: str) -> list[str]:
    """A shell script and its arguments ($1, …) as a command; any failing step fails it."""
    return ["/bin/sh", "-euc", command, "image", *arguments]


def make_devices(dev: Path) -> None:
    """Fill a tmpfs with the devices that every host has."""
    with kernel.umask(0):
        for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
            os.mknod(dev / name, 0o020666, os.makedev(1, minor))
        os.mknod(dev / "tty", 0o020666, os.makedev(5, 0))
        os.mknod(dev / "fuse", 0o020666, os.makedev(10, 229))
        for directory in ("pts", "shm"):
            (dev / directory).mkdir(0o755)
    for name, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        (dev / name).symlink_to(target)
    # gid 5 is Debian's group tty; newinstance is implied by the kernel since 4.7.
    kernel.mount("devpts", dev / "pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=620,gid=5")
    kernel.mount("shm", dev / "shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")


def _enter(spec: Sandbox) -> None:
    kernel.make_mounts_private()
    root = Path(spec.scratch) / "root"
    root.mkdir(exist_ok=True)
    if spec.lower:
        work = Path(spec.scratch) / "work"
        work.mkdir(exist_ok=True)
        kernel.mount_overlay(root, [Path(layer) for layer in spec.lower], Path(spec.upper), work)
    else:
        kernel.bind(spec.upper, root)
    for name, fstype, options in (
        ("proc", "proc", ""),
        ("run", "tmpfs", "mode=755"),
        ("tmp", "tmpfs", "mode=1777"),
        ("dev", "tmpfs", "mode=755"),
    ):
        kernel.mount(fstype, root / name, fstype, 0, options)
    make_devices(root / "dev")
    for outside, inside in spec.binds:
        target = root / inside.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.mkdir() if Path(outside).is_dir() else target.touch()
        kernel.bind(outside, target, read_only=True)
    kernel.pivot_root(root)


def main() -> None:
    """Enter the sandbox that argv describes, run its command, exit as it exited."""
    given = json.loads(sys.argv[1])
    command = given.pop("command")
    kernel.unshare(
        kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    )
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        sys.exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent()
    _enter(Sandbox(**given))
    kernel.sethostname("image")
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
