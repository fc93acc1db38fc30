"""One node: started, switched off, asked about its services."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from testbed import cgroup, network
from testbed.errors import TestbedError
from testbed.hatch import Spec
from testbed.instance import Instance
from testbed.network import Switch

_PACKAGES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Disk:
    """Where a node keeps what it writes: an overlay's upper directory, and one for its own use."""

    upper: Path
    scratch: Path

    def prepare(self) -> None:
        """Make what is not there yet."""
        for path in (self.upper, self.scratch / "work", self.scratch / "root"):
            path.mkdir(parents=True, exist_ok=True)
        self.upper.chmod(0o755)


@dataclass(frozen=True)
class Node:
    """A host of the testbed, on or off.

    :param number: counted from 1; the product's host id as well.
    """

    instance: Instance
    number: int

    @property
    def name(self) -> str:
        return f"node{self.number}"

    @property
    def address(self) -> str:
        return network.address(self.number)

    @property
    def cgroup(self) -> Path:
        """Its cgroup as the machine sees it; for the node it is the root of all cgroups."""
        return cgroup.mount_point() / self.instance.cgroup_name / self.name

    @property
    def init_pid(self) -> int | None:
        """The machine's pid of the node's init; None while the node is off."""
        file = self.instance.run / f"{self.name}.pid"
        if not file.exists():
            return None
        pid = int(file.read_text())
        wanted = f"/{self.instance.cgroup_name}/{self.name}/init.scope"
        return pid if cgroup.of_process(pid).endswith(wanted) else None

    def pid_or_error(self) -> int:
        """The pid of its init. :raises TestbedError: if the node is off."""
        pid = self.init_pid
        if pid is None:
            raise TestbedError(f"{self.name} is off", f"run `tests/testbed/nodes boot {self.name}`")
        return pid

    def start(self, lower: list[Path], disk: Disk, services: list[str]) -> None:
        """Switch it on; returns when init runs, its services may still be starting."""
        disk.prepare()
        group = cgroup.create(f"{self.instance.cgroup_name}/{self.name}")
        spec = Spec(
            name=self.name,
            cgroup=str(group),
            lower=[str(layer) for layer in lower],
            upper=str(disk.upper),
            work=str(disk.scratch / "work"),
            mount_point=str(disk.scratch / "root"),
            services=services,
        )
        with subprocess.Popen(
            [sys.executable, "-S", "-m", "testbed.hatch", spec.to_json()],
            env={"PYTHONPATH": str(_PACKAGES), "PATH": os.environ["PATH"]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as hatching:
            assert hatching.stdin is not None and hatching.stdout is not None
            pid = hatching.stdout.readline().strip()
            if hatching.stdout.readline() != "mounted\n":
                raise TestbedError(f"{self.name} did not start (its error is above)")
            Switch(self.instance).plug_in(self.name, self.number, int(pid))
            (self.instance.run / f"{self.name}.pid").write_text(f"{pid}\n")
            hatching.stdin.write("go\n")

    def power_off(self) -> None:
        """Switch it off at once; its peers hear nothing of it. Its disk stays."""
        if self.init_pid is not None:
            Switch(self.instance).unplug(self.name)
        cgroup.kill(self.cgroup)

    def end_users(self) -> None:
        """Kill every process that was started with `exec`, and wait until they are dead."""
        for group in self.cgroup.glob("user-*"):
            cgroup.kill(group)

    def wait_for_service(self, name: str, timeout_seconds: float = 30.0) -> None:
        """Return when the service has said that it is ready.

        :raises TestbedError: if it does not within the time, with the end of its log.
        """
        self._supervise(name, "", "ready", timeout_seconds)

    def restart_service(self, name: str, timeout_seconds: float = 30.0) -> None:
        """Stop it and start it again, as systemctl would; returns when it is ready."""
        self._supervise(name, f"restart {name}", "ready", timeout_seconds)

    def crash_service(self, name: str, timeout_seconds: float = 30.0) -> None:
        """Kill its process with SIGKILL; returns when its successor is ready."""
        self._supervise(name, f"crash {name}", "ready", timeout_seconds)

    def stop_service(self, name: str, timeout_seconds: float = 30.0) -> None:
        """Stop it; it stays stopped until `start_service`."""
        self._supervise(name, f"stop {name}", "down", timeout_seconds)

    def start_service(self, name: str, timeout_seconds: float = 30.0) -> None:
        """Start it; returns when it is ready."""
        self._supervise(name, f"start {name}", "ready", timeout_seconds)

    def service_states(self) -> list[str]:
        """A line "NAME STATE PID" for each service; the pid is the node's."""
        with self._connect(5.0) as lines:
            return lines.recv(4096).decode().splitlines()

    def service_log(self, name: str, lines: int | None = None) -> str:
        """The service's log, all or its last `lines`; also when the node is off."""
        pid = self.init_pid
        disk = self.instance.disks / self.name / "upper"
        root = disk if pid is None else Path(f"/proc/{pid}/root")
        path = root / "var/log" / f"{name}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return text if lines is None else "".join(text.splitlines(keepends=True)[-lines:])

    def _connect(self, timeout_seconds: float) -> socket.socket:
        path = f"/proc/{self.pid_or_error()}/root/run/testbed/init.sock"
        deadline = time.monotonic() + timeout_seconds
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.settimeout(timeout_seconds)
            try:
                client.connect(path)
                return client
            except (FileNotFoundError, ConnectionRefusedError):
                client.close()
                if time.monotonic() > deadline:
                    raise TestbedError(f"{self.name}: its init does not answer") from None
                time.sleep(0.005)  # init has just started; it has no way yet to tell us more

    def _supervise(self, service: str, command: str, wanted: str, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        pid_before, at_once, failures = "", False, 0
        with self._connect(timeout_seconds) as client, client.makefile() as lines:
            if command:
                client.sendall(f"{command}\n".encode())
            try:
                for line in lines:
                    name, state, pid = line.split()
                    if name != service:
                        continue
                    if command and not pid_before:  # how it was before the command
                        pid_before = pid
                        at_once = command.startswith(("start", "stop"))
                    elif state == wanted and (at_once or pid != pid_before):
                        return
                    failures += state == "down"
                    if wanted == "ready" and failures > 3:
                        break
                    client.settimeout(max(0.01, deadline - time.monotonic()))
            except TimeoutError:
                pass
        log = self.service_log(service, 15)
        raise TestbedError(f"{self.name}: {service} does not become {wanted}; its log ends:\n{log}")
