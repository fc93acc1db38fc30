"""Preflight with this host's settings: of a process that would leave home, and of a guest that would move on."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from agent.cgroups import Cgroup, guest_path
from agent.home_paths import below, in_view
from agent.link import Offer
from agent.this_host import guest_gone
from criu_hooks.namespaces import Namespaces
from criu_hooks.preflight import Report, check, examine
from criu_hooks.tree import ProcessTree
from migrate.config import Config

# For what passes by itself; nothing tells when.
_LOOKS = 100
_PAUSE_SECONDS = 0.02


def inspect_process(pid: int, caller_uid: int, caller_pid: int, config: Config) -> Report:
    """Every reason why this process of this host cannot leave. Reads a lot of /proc: not for the loop."""

    def look() -> Report:
        return check(
            pid,
            caller_uid,
            caller_pid=caller_pid,
            in_view=lambda path: in_view(path, config.shared_paths, caller_uid),
            ghost_limit_bytes=config.ghost_limit_bytes,
            link_remap=True,
        )

    report = look()
    for _ in range(_LOOKS):
        if not any(obstacle.passing for obstacle in report.obstacles):
            break
        time.sleep(_PAUSE_SECONDS)
        report = look()
    return report


def inspect_guest(offer: Offer, config: Config, *, held: bool = False) -> ProcessTree:
    """A guest's tree as it is now. Not for the loop.

    :param offer: by which it came.
    :param held: it stands still, so that what passes by itself does not; its departure sees to that.
    :raises MigrateError: it cannot move on, or is not here.
    """
    pid = pid_here(offer)
    for _ in range(_LOOKS):
        tree = ProcessTree.capture(pid)
        obstacles = examine(
            tree,
            offer.owner.uid,
            expected_namespaces=Namespaces.of(pid),
            in_view=lambda path: below(path, offer.view),
            ghost_limit_bytes=config.ghost_limit_bytes,
            link_remap=True,
        )
        if held:
            obstacles = tuple(o for o in obstacles if not o.passing)
        if not obstacles:
            return tree
        if not any(obstacle.passing for obstacle in obstacles):
            break
        time.sleep(_PAUSE_SECONDS)
    raise obstacles[0].error()


def pid_here(offer: Offer) -> int:
    """The pid on this host of the root of a guest that runs here. Raises HostError."""
    for pid in Cgroup(guest_path("keeper", offer.guest, "tree")).pids():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("NSpid:") and int(line.split()[-1]) == offer.ids.pid:
                    return pid
    raise guest_gone(offer.guest)
