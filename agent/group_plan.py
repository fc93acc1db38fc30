"""How a group moves: which process trees, and which of them cannot, before anything moves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from agent.group_places import Places
from agent.group_words import Identity
from agent.inspection import inspect_process
from criu_hooks.obstacles import Obstacle
from criu_hooks.proc import ancestors, command_of
from migrate import group_messages as words
from migrate.config import Config
from migrate.errors import MigrateError

_PID = re.compile(r"\bpid (\d+)\b")


@dataclass
class _Tree:
    """What moves as one: the pids of its members, by the one that a move names."""

    root: int
    where: str
    """the host where it runs"""
    uid: int | None
    """its owner's; None: preflight looks"""
    user: str = ""
    pids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Caller:
    """Who wants a group to move."""

    uid: int
    pid: int


def plan(
    places: Places,
    members: Sequence[Identity],
    destination: str,
    caller: Caller,
    config: Config,
) -> words.GroupPlan:
    """Not for the loop: it looks at everything that the processes have open.

    :param destination: the host's name; empty: one is chosen for each tree.
    """
    trees = _trees(places, members)
    units, refused = [], []
    for tree in trees:
        obstacles = _obstacles(tree, caller, config)
        if obstacles:
            told = tuple(_told(obstacle, tree, trees, caller) for obstacle in obstacles)
            refused.append(words.Stuck(tuple(tree.pids), told))
        else:
            there = tree.where == destination
            units.append(words.GroupTree(tree.root, tuple(tree.pids), there))
    return words.GroupPlan(tuple(units), tuple(refused))


def _trees(places: Places, members: Sequence[Identity]) -> list[_Tree]:
    """Each member in one tree: its guest's, or that of the uppermost member above it."""
    found: dict[str, _Tree] = {}
    plain: list[int] = []
    for process in members:
        entry, inmate = places.deputies.get(process), places.inmate(process.pid)
        if entry is not None:
            tree = found.setdefault(
                entry.guest, _Tree(process.pid, entry.peer, entry.uid, entry.user)
            )
        elif inmate is not None:
            offer, deputy = inmate.offer, places.deputy_of(inmate.offer)
            root = deputy[0].pid if deputy is not None else process.pid
            tree = found.setdefault(
                offer.guest, _Tree(root, places.host, offer.owner.uid, offer.owner.name)
            )
        else:
            plain.append(process.pid)
            continue
        tree.pids.append(process.pid)
    known = set(plain)
    for pid in plain:
        root = [pid, *(one for one in ancestors(pid) if one in known)][-1]
        found.setdefault(str(root), _Tree(root, places.host, None)).pids.append(pid)
    return sorted(found.values(), key=lambda tree: tree.pids[0])


def _obstacles(tree: _Tree, caller: Caller, config: Config) -> Sequence[Obstacle]:
    if tree.uid is not None:
        if caller.uid in (0, tree.uid):
            return ()
        reason = f"belongs to {tree.user}"
        return [Obstacle(f"pid {tree.root}", reason, "only its owner or root moves it")]
    try:
        return inspect_process(tree.root, caller.uid, caller.pid, config).obstacles
    except MigrateError as error:
        return [Obstacle(error.what, error.reason, error.remedy)]


def _told(obstacle: Obstacle, tree: _Tree, trees: Sequence[_Tree], caller: Caller) -> words.Reason:
    """What is in the way; of another member, how both could move as one tree."""
    remedy = obstacle.remedy
    others = {pid for other in trees if other is not tree for pid in other.pids}
    for word in _PID.findall(obstacle.reason):
        common = _common_parent(tree.root, int(word)) if int(word) in others else 0
        if common and common not in set(ancestors(caller.pid)):
            name = f"{common} ({command_of(common)})"
            remedy = f"let their common parent, pid {name}, join: they then move as one tree"
    return words.Reason(obstacle.subject, obstacle.reason, remedy)


def _common_parent(one: int, other: int) -> int:
    """The nearest process above both; 0 if that is only the first of all."""
    with contextlib.suppress(OSError):
        above = set(ancestors(other))
        for pid in ancestors(one):
            if pid in above:
                return pid if pid > 1 else 0
    return 0
