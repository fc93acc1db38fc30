"""Image layers: directories in the cache, each named by a hash of all that goes into it."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from testbed.instance import cache_root


def say(text: str) -> None:
    """Tell the person who waits what takes so long."""
    print(f"nodes: {text}", file=sys.stderr, flush=True)


def digest(parts: Iterable[str | bytes]) -> str:
    """Sixteen hex digits that change when any part does, or the border between two."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "big"))
        total.update(raw)
    return total.hexdigest()[:16]


def layer(kind: str, key: str, what: str, build: Callable[[Path, Path], None]) -> Path:
    """The layer `kind`-`key`, built first if the cache has none. The caller holds the cache's lock.

    :param what: what takes time, for the person who waits.
    :param build: makes the layer, given its directory and one for scratch on the same file system.
        If it fails nothing is kept.
    """
    path = cache_root() / "layers" / f"{kind}-{key}"
    if path.is_dir():
        os.utime(path)  # the last use, for prune()
        return path
    say(what)
    building = cache_root() / "building"
    remove_tree(building)  # the leftovers of a build that was killed
    try:
        root, scratch = building / "root", building / "scratch"
        for directory in (root, scratch, path.parent):
            directory.mkdir(parents=True, exist_ok=True)
        build(root, scratch)
        root.chmod(0o755)
        root.rename(path)
    finally:
        remove_tree(building)
    os.utime(path)
    return path


def prune(kind: str, keep: int, used: set[Path]) -> None:
    """Remove old layers of a kind that changes often, but the newest `keep` and those in `used`."""
    found = sorted(
        (cache_root() / "layers").glob(f"{kind}-*"), key=lambda p: p.stat().st_mtime, reverse=True
    )
    for path in found[keep:]:
        if path not in used and time.time() - path.stat().st_mtime > 600:
            remove_tree(path)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; nothing happens if there is none."""
    if path.exists():
        shutil.rmtree(path)


def run_outside(command: list[str], **environment: str) -> None:
    """Run a command of the machine's; its output goes to stderr. :raises CalledProcessError:"""
    subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env={**os.environ, **environment},
    )
