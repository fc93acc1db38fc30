"""How a group moves: which trees, and what is told of members that cannot be separated."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from agent import group_plan
from agent.group_files import Process
from agent.group_places import Places
from agent.group_plan import Caller, plan
from agent.group_words import Identity
from criu_hooks.obstacles import Obstacle
from criu_hooks.preflight import Report
from migrate.config import Config
from migrate.group_messages import GroupTree

NOBODY_AWAY = Places("node1", {}, {})
CONFIG = Config(hosts=(), name="node1")
CALLER = Caller(uid=os.getuid(), pid=1)


class Family:
    """A shell with two children, by pid."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        self.parent = process.pid
        self.children = [int(word) for word in process.stdout.readline().split()]


@pytest.fixture
def family() -> Iterator[Family]:
    script = "sleep 600 & one=$!; sleep 600 & echo $one $!; read line; kill $one $!"
    with subprocess.Popen(
        ["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shell:
        yield Family(shell)
        shell.communicate("enough\n")


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> dict[int, Obstacle]:
    """What preflight is to find, by the root of the tree."""
    found: dict[int, Obstacle] = {}

    def inspect(pid: int, *_: object) -> Report:
        return Report(None, (found[pid],) if pid in found else ())

    monkeypatch.setattr(group_plan, "inspect_process", inspect)
    return found


def identities(*pids: int) -> list[Identity]:
    return [Process.look(pid).identity for pid in sorted(pids)]


def test_members_below_another_member_go_with_it(
    family: Family, obstacles: dict[int, Obstacle]
) -> None:
    members = identities(family.parent, *family.children)
    made = plan(NOBODY_AWAY, members, "node2", CALLER, CONFIG)
    assert made.trees == (GroupTree(family.parent, tuple(p.pid for p in members)),)
    assert made.stuck == ()


def test_members_whose_parent_is_none_move_each_for_itself(
    family: Family, obstacles: dict[int, Obstacle]
) -> None:
    made = plan(NOBODY_AWAY, identities(*family.children), "", CALLER, CONFIG)
    assert made.trees == tuple(GroupTree(pid, (pid,)) for pid in sorted(family.children))


def test_what_two_members_share_is_told_with_the_parent_to_add(
    family: Family, obstacles: dict[int, Obstacle]
) -> None:
    one, other = family.children
    obstacles[one] = Obstacle("fd 3", f"is connected to pid {other} (sleep)", "close it")
    made = plan(NOBODY_AWAY, identities(one, other), "node2", CALLER, CONFIG)
    assert made.trees == (GroupTree(other, (other,)),)
    (stuck,) = made.stuck
    assert stuck.pids == (one,)
    assert stuck.reasons[0].remedy == (
        f"let their common parent, pid {family.parent} (sh), join: they then move as one tree"
    )


def test_what_is_shared_with_others_keeps_its_remedy(
    family: Family, obstacles: dict[int, Obstacle]
) -> None:
    one, other = family.children
    obstacles[one] = Obstacle("fd 3", f"is connected to pid {family.parent} (sh)", "close it")
    made = plan(NOBODY_AWAY, identities(one, other), "node2", CALLER, CONFIG)
    assert made.stuck[0].reasons[0].remedy == "close it"


def test_the_callers_own_parent_is_not_proposed(
    family: Family, obstacles: dict[int, Obstacle]
) -> None:
    one, other = family.children
    obstacles[one] = Obstacle("fd 3", f"is connected to pid {other} (sleep)", "close it")
    caller = Caller(uid=os.getuid(), pid=other)
    made = plan(NOBODY_AWAY, identities(one, other), "node2", caller, CONFIG)
    assert made.stuck[0].reasons[0].remedy == "close it"
