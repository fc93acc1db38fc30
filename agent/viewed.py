"""Which paths a guest sees as they are at home, and which are those of the host where it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from criu_hooks.tree import ProcessTree

SYSTEM_DIRECTORIES = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/sbin",
    "/etc",
    "/opt",
    "/var/lib",
    "/var/log",
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/boot",
)
VIEW_DIRECTORIES = ("/home", "/tmp", "/var/tmp")


def in_view(path: str, shared_paths: tuple[str, ...]) -> bool:
    """Whether it comes from home.

    :param shared_paths: what all hosts of the cluster have anyway (config.toml).
    """
    local = (*SYSTEM_DIRECTORIES, *shared_paths)
    return not any(_below(path, top) for top in local)


def view_of(tree: ProcessTree, shared_paths: tuple[str, ...]) -> tuple[str, ...]:
    """What comes from home: where users write, and where this tree works and has files open."""
    wanted = [p.private.cwd for p in tree.members]
    wanted += [
        str(Path(f.link).parent)
        for _, f in tree.files()
        if f.link.startswith("/") and not f.deleted
    ]
    return view_around(wanted, shared_paths)


def view_around(wanted: Iterable[str], shared_paths: tuple[str, ...]) -> tuple[str, ...]:
    """What comes from home if these directories are to."""
    found = list(VIEW_DIRECTORIES)
    for directory in wanted:
        covered = any(_below(directory, top) for top in found)
        if directory != "/" and not covered and in_view(directory, shared_paths):
            found.append(directory)
    return tuple(path for path in found if path not in shared_paths)


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")
