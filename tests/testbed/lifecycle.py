"""A testbed as a whole: up, down, and which nodes it has."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from testbed import cgroup, image, layers
from testbed.errors import TestbedError
from testbed.image import Image
from testbed.instance import RUN_ROOT, Instance, cache_root, locked
from testbed.network import Switch
from testbed.node import Disk, Node
from testbed.seed import seed_layer

SERVICES = ["ssh", "migd"]
DEFAULT_COUNT = 3


@dataclass(frozen=True)
class State:
    """What is up.

    :param seed: the directory of the nodes' seeds; "" while it is being made.
    :param layers: the image's, the topmost first.
    """

    count: int
    seed: str
    layers: list[str]

    @staticmethod
    def read(run: Path) -> "State | None":
        """The state of the testbed whose directory is `run`; None if it is down."""
        file = run / "state.json"
        return State(**json.loads(file.read_text())) if file.exists() else None

    def write(self, run: Path) -> None:
        new = run / "state.new"
        new.write_text(json.dumps(asdict(self)))
        new.rename(run / "state.json")


@dataclass(frozen=True)
class Testbed:
    """The nodes of one checkout."""

    __test__ = False  # it is no test class
    instance: Instance = field(default_factory=Instance)

    def nodes(self) -> list[Node]:
        """Those that are up, or were and have been switched off; [] when the testbed is down."""
        state = State.read(self.instance.run)
        return [Node(self.instance, n + 1) for n in range(state.count)] if state else []

    def node(self, name: str) -> Node:
        """:raises TestbedError: if there is no such node."""
        nodes = self.nodes()
        for node in nodes:
            if node.name == name:
                return node
        if not nodes:
            raise TestbedError("the testbed is down", "run `tests/testbed/nodes up`")
        known = ", ".join(node.name for node in nodes)
        raise TestbedError(f"no node is called {name}", f"there are {known}")

    def up(self, count: int | None = None) -> None:
        """Have `count` nodes on, with the product as it is in the checkout.

        Nodes that are on already, with the same product, stay as they are.

        :param count: None leaves the number as it is; three if nothing is up.
        """
        with self.instance.lock():
            state = State.read(self.instance.run)
            wanted = count or (state.count if state else DEFAULT_COUNT)
            with locked(cache_root() / "lock"):
                built = image.build()
            if (
                state
                and state.seed
                and state.count == wanted
                and str(built.product) in state.layers
            ):
                for node in self.nodes():
                    if node.init_pid is None:
                        self._boot(node, state)
            else:
                self._down()
                self._start(built, wanted)
        self.wait_until_ready()

    def _start(self, built: Image, count: int) -> None:
        try:
            self.instance.run.mkdir(mode=0o755, parents=True)
            Switch(self.instance).start()
            state = State(count, "", [str(layer) for layer in built.layers])
            state.write(self.instance.run)
            with locked(cache_root() / "lock"):
                state = replace(state, seed=str(seed_layer(self.instance, built, count)))
            state.write(self.instance.run)
            for node in self.nodes():
                self._boot(node, state)
            with locked(cache_root() / "lock"):
                self._prune()
        except BaseException:
            self._down()
            raise

    def _boot(self, node: Node, state: State) -> None:
        lower = [Path(state.seed) / node.name, *map(Path, state.layers)]
        disks = self.instance.disks / node.name
        node.start(lower, Disk(disks / "upper", disks), SERVICES)

    def boot(self, name: str) -> None:
        """Switch a node on again, with its disk as it was. Returns when it is ready."""
        node = self.node(name)
        with self.instance.lock():
            state = State.read(self.instance.run)
            if node.init_pid is None and state is not None:
                cgroup.kill(node.cgroup)  # when its init has died by itself
                self._boot(node, state)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return when every service of every node that is on is ready. :raises TestbedError:"""
        for node in self.nodes():
            for service in SERVICES if node.init_pid is not None else []:
                node.wait_for_service(service)

    def kill(self, name: str) -> None:
        """Switch a node off at once."""
        node = self.node(name)
        with self.instance.lock():
            node.power_off()

    def down(self) -> None:
        """End and remove everything of this testbed, whatever state it is in."""
        with self.instance.lock():
            self._down()

    def _down(self) -> None:
        cgroup.kill(cgroup.mount_point() / self.instance.cgroup_name)
        layers.remove_tree(self.instance.run)
        layers.remove_tree(self.instance.disks)

    @staticmethod
    def _prune() -> None:
        states = [State.read(run) for run in RUN_ROOT.iterdir() if run.is_dir()]
        used = {Path(path) for state in states if state for path in [state.seed, *state.layers]}
        for kind in ("base", "deps", "builder", "product", "seed"):
            layers.prune(kind, 3, used)
