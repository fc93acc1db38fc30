"""A node's init (below tini): starts its services and restarts those that end.

It stands for systemd, as far as the product can see: readiness by sd_notify, Restart=always, a
cgroup for each service, and KillMode=process: what a service has started outlives it. It runs
inside the node, by itself, so it imports nothing of the testbed. On /run/testbed/init.sock a client
gets a line for each service, "NAME STATE PID", and another one whenever something changes; it may
send "VERB NAME" with start, stop, restart, or crash: a kill -9, after which it comes back.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

RUN = Path("/run/testbed")
CGROUPS = Path("/sys/fs/cgroup/system.slice")
COMMANDS = {
    "ssh": ["/usr/sbin/sshd", "-D", "-e"],
    "migd": ["/usr/local/bin/migd"],
}
DELAY_SECONDS = 0.1  # systemd's RestartSec
LONGEST_DELAY_SECONDS = 5.0


@dataclass
class Service:
    """One service and what it does just now."""

    name: str
    notify: socket.socket
    child: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    ready: bool = False
    wanted: bool = True
    started: float = 0.0
    restart_at: float | None = None
    delay_seconds: float = DELAY_SECONDS

    def __str__(self) -> str:
        state = "down" if self.child is None else "ready" if self.ready else "starting"
        return f"{self.name} {state} {self.child.pid if self.child else 0}"


class Supervisor:
    """The loop. Everything happens in one thread."""

    def __init__(self, names: list[str]) -> None:
        self.selector = selectors.DefaultSelector()
        self.clients: list[socket.socket] = []
        self.services = [Service(name, self._notify_socket(name)) for name in names]
        for service in self.services:
            self._watch(service.notify, partial(self._notified, service))
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(RUN / "init.sock"))
        (RUN / "init.sock").chmod(0o600)
        self.listener.listen()
        self._watch(self.listener, self._accept)

    def run(self) -> None:
        """Supervise for ever."""
        for service in self.services:
            self._start(service)
        while True:
            for key, _ in self.selector.select(self._seconds_to_restart()):
                key.data()
            for service in self.services:
                if service.restart_at is not None and service.restart_at <= time.monotonic():
                    self._start(service)

    def _watch(self, what: socket.socket | int, handler: Callable[[], None]) -> None:
        self.selector.register(what, selectors.EVENT_READ, handler)

    def _seconds_to_restart(self) -> float | None:
        times = [s.restart_at for s in self.services if s.restart_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    # services

    @staticmethod
    def _notify_socket(name: str) -> socket.socket:
        path = RUN / f"{name}.notify"
        received = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        received.bind(str(path))
        return received

    def _start(self, service: Service) -> None:
        group = CGROUPS / f"{service.name}.service"
        group.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "NOTIFY_SOCKET": str(RUN / f"{service.name}.notify"),
        }
        service.restart_at, service.ready, service.started = None, False, time.monotonic()
        with open(f"/var/log/{service.name}.log", "ab") as log:
            try:
                service.child = subprocess.Popen(
                    COMMANDS[service.name],
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=lambda: (group / "cgroup.procs").write_text("0") and None,
                )
            except OSError as error:
                log.write(f"cannot start: {error}\n".encode())
                self._restart_later(service)
                return
        service.pidfd = os.pidfd_open(service.child.pid)
        self._watch(service.pidfd, lambda: self._ended(service))
        self._tell(str(service))

    def _ended(self, service: Service) -> None:
        assert service.child is not None
        self.selector.unregister(service.pidfd)
        os.close(service.pidfd)
        status = service.child.wait()
        print(f"{service.name} ended with {status}", flush=True)
        service.child, service.ready = None, False
        if service.wanted:
            self._restart_later(service)
        self._tell(str(service))

    @staticmethod
    def _restart_later(service: Service) -> None:
        now = time.monotonic()
        lived_long = now - service.started > 2.0
        service.delay_seconds = (
            DELAY_SECONDS if lived_long else min(2 * service.delay_seconds, LONGEST_DELAY_SECONDS)
        )
        service.restart_at = now + service.delay_seconds

    def _notified(self, service: Service) -> None:
        lines = service.notify.recv(4096).decode(errors="replace").splitlines()
        if "READY=1" in lines and service.child is not None:
            service.ready = True
            self._tell(str(service))

    # clients

    def _accept(self) -> None:
        client, _ = self.listener.accept()
        client.settimeout(1.0)
        self.clients.append(client)
        self._watch(client, lambda: self._command(client))
        self._send(client, "".join(f"{service}\n" for service in self.services))

    def _command(self, client: socket.socket) -> None:
        try:
            line = client.recv(4096).decode(errors="replace").split()
        except OSError:
            line = []
        if len(line) != 2:
            self._drop(client)
            return
        for service in self.services:
            if service.name == line[1]:
                self._obey(line[0], service)

    def _obey(self, verb: str, service: Service) -> None:
        service.wanted = verb != "stop"
        if verb == "crash" and service.child is not None:
            service.child.kill()
        elif verb in ("stop", "restart") and service.child is not None:
            service.ready = False
            service.started = 0.0  # asked for: it is no crash that has to wait longer each time
            service.child.send_signal(signal.SIGTERM)
        elif verb in ("start", "restart") and service.child is None:
            self._start(service)
        self._tell(str(service))

    def _tell(self, line: str) -> None:
        for client in list(self.clients):
            self._send(client, line + "\n")

    def _send(self, client: socket.socket, text: str) -> None:
        try:
            client.sendall(text.encode())
        except OSError:
            self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self.selector.unregister(client)
            client.close()


if __name__ == "__main__":
    os.umask(0o022)
    Supervisor(sys.argv[1:]).run()
