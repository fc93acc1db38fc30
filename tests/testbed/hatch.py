"""From a process to a node: namespaces, root file system, devices, then init.

As a program: ``python3 -m testbed.hatch SPEC`` (JSON of Spec). It writes two lines, the pid of the
node's init and "mounted"; after a line on its standard input init starts.
"""

import json
import os
import signal
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from testbed import kernel
from testbed.sandbox import make_devices

_SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Spec:
    """A node to start. `lower`: layers, the topmost first; `mount_point`: an empty directory."""

    name: str
    cgroup: str
    lower: list[str]
    upper: str
    work: str
    mount_point: str
    services: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def reset_signals() -> None:
    """Handle and block signals as a process that was started by hand."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _mount_root(spec: Spec) -> Path:
    root = Path(spec.mount_point)
    lower = [Path(layer) for layer in spec.lower]
    kernel.mount_overlay(root, lower, Path(spec.upper), Path(spec.work))
    hidden = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", root / "proc", "proc", hidden)
    kernel.mount("sysfs", root / "sys", "sysfs", hidden | kernel.MS_RDONLY)
    kernel.mount("cgroup2", root / "sys/fs/cgroup", "cgroup2", hidden)
    kernel.mount("tmpfs", root / "dev", "tmpfs", kernel.MS_NOSUID, "mode=755")
    make_devices(root / "dev")
    kernel.mount("tmpfs", root / "run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    return root


def _prepare_run(run: Path) -> None:
    """What init needs, in the node's /run: gone when the node is off."""
    (run / "sshd").mkdir()
    (run / "lock").mkdir()
    (run / "lock").chmod(0o1777)
    testbed = run / "testbed"
    testbed.mkdir(0o755)
    (testbed / "supervisor.py").write_bytes(_SUPERVISOR.read_bytes())
    # The kernel has one boot id; a node that is switched off and on has to show a new one.
    (testbed / "boot_id").write_text(f"{uuid.uuid4()}\n")


def _become_node(spec: Spec) -> None:
    kernel.make_mounts_private()
    os.umask(0o022)
    root = _mount_root(spec)
    _prepare_run(root / "run")
    kernel.bind(root / "run/testbed/boot_id", root / "proc/sys/kernel/random/boot_id")
    scope = root / "sys/fs/cgroup/init.scope"
    scope.mkdir(exist_ok=True)
    (scope / "cgroup.procs").write_text("0")
    kernel.pivot_root(root)
    kernel.sethostname(spec.name)


def _start_init(services: list[str]) -> None:
    log = os.open("/var/log/init.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    null = os.open("/dev/null", os.O_RDONLY)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    os.closerange(3, 1 << 20)
    reset_signals()
    command = ["/usr/bin/tini", "--", "/usr/bin/python3", "-IS", "/run/testbed/supervisor.py"]
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    environment["LANG"] = "C.UTF-8"
    os.execve(command[0], [*command, *services], environment)


def main() -> None:
    """Start the node that argv describes."""
    spec = Spec(**json.loads(sys.argv[1]))
    os.setsid()
    (Path(spec.cgroup) / "cgroup.procs").write_text("0")
    kernel.unshare(kernel.NODE_NAMESPACES)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        os._exit(0)
    _become_node(spec)
    print("mounted", flush=True)
    if sys.stdin.readline():
        _start_init(spec.services)


if __name__ == "__main__":
    main()
