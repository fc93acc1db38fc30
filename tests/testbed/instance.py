"""One testbed, belonging to one checkout: where its files are, and its lock."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RUN_ROOT = Path("/run/migrate-testbed")
CHECKOUT = Path(__file__).resolve().parents[2]


def cache_root() -> Path:
    """Where images are kept between runs: $MIGRATE_TESTBED_CACHE or /var/cache/migrate-testbed."""
    return Path(os.environ.get("MIGRATE_TESTBED_CACHE", "/var/cache/migrate-testbed"))


@dataclass(frozen=True)
class Instance:
    """The testbed of the checkout at `checkout`."""

    checkout: Path = CHECKOUT

    @property
    def key(self) -> str:
        """Eight hex digits that tell this checkout's testbed from others' on the machine."""
        return hashlib.sha256(os.fsencode(self.checkout)).hexdigest()[:8]

    @property
    def run(self) -> Path:
        """Its state while it is up."""
        return RUN_ROOT / self.key

    @property
    def disks(self) -> Path:
        """What its nodes have written: an overlay's upper directory for each."""
        return cache_root() / "disks" / self.key

    @property
    def cgroup_name(self) -> str:
        """Its cgroup, below the cgroup v2 mount."""
        return f"migrate-testbed-{self.key}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this testbed: one `up`, `down`, `kill` or `boot` at a time."""
        with locked(RUN_ROOT / f"{self.key}.lock"):
            yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` for the block. Dies with the process; not inherited."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
