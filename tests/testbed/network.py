"""The nodes' network: a switch in a network namespace of its own.

So the machine's links, addresses and packet filters have no part in it, and two testbeds may use
the same addresses.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from testbed import cgroup
from testbed.errors import TestbedError
from testbed.instance import Instance

_SWITCH = """
echo 0 >"$1/cgroup.procs"
exec unshare --net sh -euc '
ip link set lo up
ip link add lan type bridge
ip link set lan up
echo ready
exec sleep infinity >&-
'
"""


def address(number: int) -> str:
    """The address of node `number`, counted from 1, in 10.88.0.0/24."""
    return f"10.88.0.{number}"


@dataclass(frozen=True)
class Switch:
    """The bridge between the nodes of an instance; a sleeping process holds it."""

    instance: Instance

    @property
    def _pid_file(self) -> Path:
        return self.instance.run / "switch.pid"

    def start(self) -> None:
        """Make it, with nothing plugged in."""
        group = cgroup.create(f"{self.instance.cgroup_name}/switch")
        # Not waited for: it ends with the instance's cgroup, and this process ends before.
        holder = subprocess.Popen(
            ["sh", "-euc", _SWITCH, "switch", str(group)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert holder.stdout is not None
        with holder.stdout:
            if holder.stdout.readline() != b"ready\n":
                raise TestbedError("the kernel made no bridge", "is this root, with CAP_NET_ADMIN?")
        self._pid_file.write_text(f"{holder.pid}\n")

    def plug_in(self, node: str, number: int, pid: int) -> None:
        """Give the network namespace of process `pid` a link to the switch and an address."""
        self.unplug(node)  # the kernel may still be clearing up after an init that died by itself
        self._ip(
            # The same hardware address after a boot: or its neighbours would not find it for a while.
            f"link add {node} type veth peer name eth0 address 02:00:0a:58:00:{number:02x}"
            f" netns {pid}",
            f"link set {node} master lan up",
        )
        _ip_of(
            pid,
            "link set lo up",
            f"addr add {address(number)}/24 dev eth0",
            "link set eth0 up",
        )

    def cut(self, node: str) -> None:
        """Let packets from and to the node get lost; it keeps its link and its address."""
        self._ip(f"link set {node} nomaster")

    def heal(self, node: str) -> None:
        """Undo `cut`."""
        self._ip(f"link set {node} master lan")

    def unplug(self, node: str) -> None:
        """Take the node's link away, both ends; nothing happens if there is none."""
        if node in self.links():
            self._ip(f"link del {node}")

    def links(self) -> dict[str, bool]:
        """The nodes that have a link, and whether it is joined to the others (False: cut)."""
        shown = _ip_of(self._pid(), "-o link show type veth")
        found = {}
        for line in shown.splitlines():
            name = line.split(": ")[1].partition("@")[0]
            found[name] = " master lan " in line
        return found

    def _ip(self, *commands: str) -> str:
        return _ip_of(self._pid(), *commands)

    def _pid(self) -> int:
        if self._pid_file.exists():
            pid = int(self._pid_file.read_text())
            if cgroup.of_process(pid).endswith(f"/{self.instance.cgroup_name}/switch"):
                return pid
        raise TestbedError("the nodes' network is not there", "run `tests/testbed/nodes up`")


def _ip_of(pid: int, *commands: str) -> str:
    """Run `ip` commands in the network namespace of a process. :return: what they print."""
    if len(commands) == 1 and commands[0].startswith("-"):
        arguments, script = commands[0].split(), ""
    else:
        arguments, script = ["-batch", "-"], "\n".join(commands)
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *arguments],
        input=script,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise TestbedError(f"ip ({'; '.join(commands)}) failed: {done.stderr.strip()}")
    return done.stdout
