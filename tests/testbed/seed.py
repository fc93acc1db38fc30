"""What is on a node's disk when it is first switched on: its name, keys, trust in the others.

A seed is made once for each image and number of nodes, in nodes that are switched on for it: the
product is set up and joined there as an administrator does it. The next `up` finds it in the cache.
"""

import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from testbed import layers
from testbed.errors import TestbedError
from testbed.image import Image
from testbed.instance import Instance
from testbed.node import Disk, Node

NODES = Path(__file__).with_name("nodes")
_VERSION = "1"  # counted up when what this module writes changes


def seed_layer(instance: Instance, image: Image, count: int) -> Path:
    """A directory with an overlay layer for each node, by name; to be called with all nodes off."""
    key = layers.digest([_VERSION, image.product.name, str(count), Path(__file__).read_bytes()])
    nodes = [Node(instance, number) for number in range(1, count + 1)]

    def make(root: Path, scratch: Path) -> None:
        disks = {node: Disk(root / node.name, scratch / node.name) for node in nodes}
        try:
            _write_identities(disks)
            for node, disk in disks.items():
                node.start(image.layers, disk, ["ssh"])
            _set_up_product(nodes)
        finally:
            for node in nodes:
                node.power_off()
        for disk in disks.values():
            for log in (disk.upper / "var/log").glob("*.log"):
                log.unlink()

    return layers.layer("seed", key, f"setting up {count} nodes", make)


def _write_identities(disks: dict[Node, Disk]) -> None:
    first = next(iter(disks))
    keys = first.instance.run / "keys"
    keys.mkdir(exist_ok=True)
    for name in ["root", *(node.name for node in disks)]:
        _make_key(keys / name)
    hosts = "127.0.0.1 localhost\n::1 localhost\n"
    hosts += "".join(f"{node.address} {node.name}\n" for node in disks)
    known = "".join(
        f"{node.name},{node.address} {(keys / f'{node.name}.pub').read_text()}" for node in disks
    )
    for node, disk in disks.items():
        disk.prepare()
        files = _Files(disk.upper)
        files.write("etc/hostname", f"{node.name}\n")
        files.write("etc/hosts", hosts)
        files.write("etc/machine-id", f"{uuid.uuid4().hex}\n")
        files.write("etc/ssh/ssh_known_hosts", known)
        for suffix, mode in (("", 0o600), (".pub", 0o644)):
            own = (keys / f"{node.name}{suffix}").read_text()
            files.write(f"etc/ssh/ssh_host_ed25519_key{suffix}", own, mode)
            files.write(f"root/.ssh/id_ed25519{suffix}", (keys / f"root{suffix}").read_text(), mode)
        files.write("root/.ssh/authorized_keys", (keys / "root.pub").read_text(), 0o600)
        files.write("etc/migrate/config.toml", _product_config(node, list(disks)))


class _Files:
    """Writes files into an overlay's upper directory; its modes replace the image's."""

    def __init__(self, upper: Path) -> None:
        self._upper = upper

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self._upper / name
        for parent in reversed(path.parents):
            if self._upper in parent.parents and not parent.exists():
                private = parent.relative_to(self._upper).parts[0] == "root"
                parent.mkdir(0o700 if private else 0o755)
        path.write_text(text)
        path.chmod(mode)


def _make_key(path: Path) -> None:
    if not path.exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
        subprocess.run(command, check=True)


def _product_config(node: Node, nodes: list[Node]) -> str:
    # The nodes share one machine, whose load is not theirs.
    lines = [
        f'name = "{node.name}"',
        "load_accept = [500, 500, 500]",
        "load_stop = [999, 999, 999]",
        "",
    ]
    for host in nodes:
        lines += ["[[host]]", f'name = "{host.name}"', f"id = {host.number}"]
        lines += [f'address = "{host.address}"', ""]
    return "\n".join(lines)


def _set_up_product(nodes: list[Node]) -> None:
    def set_up(node: Node) -> None:
        node.wait_for_service("ssh")
        _in_node(node, ["migctl", "setup"])

    def join(node: Node) -> None:
        for other in nodes:
            if other.number > node.number:
                _in_node(node, ["migctl", "join", other.name])

    for step in (set_up, join):
        _for_all(nodes, step)


def _for_all(nodes: list[Node], step: Callable[[Node], None]) -> None:
    with ThreadPoolExecutor(len(nodes)) as pool:
        for _ in pool.map(step, nodes):
            pass


def _in_node(node: Node, command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-IS", str(NODES), "exec", node.name, "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        words = " ".join(command)
        raise TestbedError(f"`{words}` failed on {node.name} ({done.returncode}):\n{done.stdout}")
