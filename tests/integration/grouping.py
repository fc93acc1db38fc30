"""Groups of processes, as the tests use them."""

import re

from moving import Desk, guest_pids
from testbed.client import Nodes, Result

FILES = "/run/migrate/proc"


def sleepers(desk: Desk, count: int) -> list[int]:
    """Jobs of alice's at home that do nothing, by their pids."""
    return [desk.job("sleep 600 </dev/null >/dev/null")[1] for _ in range(count)]


def run(desk: Desk, *words: str, node: str = "", user: str = "", check: bool = True) -> Result:
    """One of the programs, as a user runs it."""
    return desk.nodes.exec(node or desk.home, words, user=user or desk.user, check=check)


def group(nodes: Nodes, node: str, pid: int) -> str:
    """What is in a process's file."""
    return nodes.sh(node, f'cat {FILES}/"$1"/miggroup', str(pid), user="bob")


def inner(nodes: Nodes, node: str, pid: int) -> int:
    """A process's pid as it sees it itself; 0 if it has ended."""
    status = nodes.exec(node, ["cat", f"/proc/{pid}/status"], check=False).stdout
    found = re.search(r"^NSpid:.*\t(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else 0


def guest_root(nodes: Nodes, node: str, pid: int) -> int:
    """The pid on a node of the root of a guest that runs there."""
    (found,) = [one for one in guest_pids(nodes, node, pid) if inner(nodes, node, one) == pid]
    return found
