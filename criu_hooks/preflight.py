"""Preflight: every reason why a process tree can not move, all at once, before anything freezes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from criu_hooks.namespaces import Namespaces
from criu_hooks.obstacles import Note, Obstacle
from criu_hooks.preflight_files import (
    GHOST_LIMIT_BYTES,
    Policy,
    default_view,
    file_notes,
    file_obstacles,
)
from criu_hooks.preflight_identity import (
    forbidden,
    identity_notes,
    identity_obstacles,
    own_shell,
)
from criu_hooks.preflight_sharing import sharing_obstacles
from criu_hooks.surroundings import Surroundings
from criu_hooks.tree import Process, ProcessTree, gone
from migrate.errors import HostError

__all__ = ["Note", "Obstacle", "Report", "check", "examine", "notes"]


@dataclass(frozen=True, slots=True)
class Report:
    """What preflight found."""

    tree: ProcessTree | None
    """None if the caller has no right to move it: then nothing but the root was looked at"""
    obstacles: tuple[Obstacle, ...]
    """empty: it can move"""
    notes: tuple[Note, ...] = ()


def check(
    pid: int,
    caller_uid: int,
    *,
    caller_pid: int | None = None,
    expected_namespaces: Namespaces | None = None,
    in_view: Callable[[str], bool] = default_view,
    ghost_limit_bytes: int = GHOST_LIMIT_BYTES,
    link_remap: bool = False,
) -> Report:
    """Captures the tree below `pid` and examines it.

    Who may not move it makes it look no further than the root.

    Parameters as in `examine`.

    :raises UserError: there is no such process.
    :raises HostError: the host's processes or sockets can not be looked at.
    """
    try:
        root = Process.read(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None
    if obstacle := forbidden(root, caller_uid):
        return Report(None, (obstacle,))
    tree = ProcessTree.capture(pid)
    obstacles = examine(
        tree,
        caller_uid,
        caller_pid=caller_pid,
        expected_namespaces=expected_namespaces,
        in_view=in_view,
        ghost_limit_bytes=ghost_limit_bytes,
        link_remap=link_remap,
    )
    return Report(tree, obstacles, notes(tree))


def examine(
    tree: ProcessTree,
    caller_uid: int,
    *,
    caller_pid: int | None = None,
    expected_namespaces: Namespaces | None = None,
    in_view: Callable[[str], bool] = default_view,
    ghost_limit_bytes: int = GHOST_LIMIT_BYTES,
    link_remap: bool = False,
    surroundings: Surroundings | None = None,
) -> tuple[Obstacle, ...]:
    """Every reason why this tree can not move; empty if it can.

    A caller without a right to move it learns that and nothing else about it.

    :param caller_uid: who asks; 0 may move everybody's processes.
    :param caller_pid: the client that asks: its own shell can not move.
    :param expected_namespaces: those of the capsule, for a guest; default: those of pid 1.
    :param in_view: whether a path is served from home; there a held lock stops a move.
    :param ghost_limit_bytes: the largest deleted file that CRIU is going to be allowed.
    :param link_remap: whether CRIU is going to be allowed link remaps.
    :param surroundings: what to know of the host, gathered here by default.
    :raises UserError: the tree is gone.
    :raises HostError: the host's processes or sockets can not be looked at.
    """
    if obstacle := forbidden(tree.root, caller_uid):
        return (obstacle,)
    around = surroundings or _gather(tree, expected_namespaces, caller_pid)
    if around.callers & tree.pids:
        return (own_shell(tree),)  # the rest would be about the client itself
    policy = Policy(in_view, ghost_limit_bytes, link_remap)
    return (
        *identity_obstacles(tree, around),
        *file_obstacles(tree, around, policy),
        *sharing_obstacles(tree, around),
    )


def _gather(
    tree: ProcessTree, namespaces: Namespaces | None, caller_pid: int | None
) -> Surroundings:
    try:
        return Surroundings.gather(tree, namespaces=namespaces, caller_pid=caller_pid)
    except (FileNotFoundError, ProcessLookupError):
        raise gone(tree.root.pid) from None
    except OSError as error:
        raise HostError(
            "preflight",
            f"this host does not let its processes and sockets be looked at ({error.strerror})",
            "run migd as root; load the kernel module unix_diag",
        ) from error


def notes(tree: ProcessTree) -> tuple[Note, ...]:
    """What does not stop a move, but should be known."""
    return (*identity_notes(tree), *file_notes(tree))
