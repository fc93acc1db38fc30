"""The destination's judgement of an offer: may this guest come here?"""

from __future__ import annotations

import grp
import os
import pwd
from pathlib import Path

import psutil

from agent.home_paths import KERNEL_DIRECTORIES, below
from agent.link import Offer, Owner
from migrate import paths
from migrate.config import Config
from migrate.errors import PeerError

HOST_ONLY = (*KERNEL_DIRECTORIES, str(paths.RUN_DIR))


def cpu_features() -> tuple[str, ...]:
    """The processor's feature flags, as /proc/cpuinfo names them (those all processors have)."""
    common: set[str] | None = None
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            common = flags if common is None else common & flags
    return tuple(sorted(common or ()))


def free_memory_bytes() -> int:
    """Memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def judge(offer: Offer, peer: str, config: Config, criu_version: str) -> None:
    """Accept silently, or raise PeerError with the reason.

    :param peer: who makes the offer, proved by its key.
    """
    here = f"host {config.name}"
    if offer.source != peer:
        raise PeerError(here, f"the offer comes from {peer}, not from {offer.source}")
    if offer.home != config.name and all(host.name != offer.home for host in config.peers):
        raise PeerError(
            here,
            f"does not know {offer.home}, the guest's home",
            f"run `migctl join {offer.home}` there",
        )
    if not config.accept_guests and offer.home != config.name:
        raise PeerError(here, "takes no guests (accept_guests = false)", "choose another host")
    if offer.machine != os.uname().machine:
        raise PeerError(
            here, f"is {os.uname().machine}, the process {offer.machine}", "choose another host"
        )
    missing = set(offer.cpu_features) - set(cpu_features())
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise PeerError(here, f"its processor lacks {names}", "choose another host")
    if offer.criu_version != criu_version:
        raise PeerError(
            here,
            f"has CRIU {criu_version}, {offer.source} has {offer.criu_version}",
            "install the same version on both",
        )
    # The images are held once, and then the process itself.
    needed = 2 * offer.memory_bytes + config.min_free_memory_bytes
    if free_memory_bytes() < needed:
        raise PeerError(
            here,
            f"has {free_memory_bytes() >> 20} MiB of memory free, {needed >> 20} MiB are needed",
            "choose another host",
        )
    _judge_owner(offer.owner, here)
    for path in (*offer.view, *(file.path for file in offer.files)):
        _judge_path(path, here)


def _judge_path(path: str, here: str) -> None:
    """What comes from home is laid over this host's files: not over those that a capsule needs."""
    parts = path.split("/")
    if parts[0] or len(parts) < 2 or not all(parts[1:]) or {".", ".."} & set(parts):
        raise PeerError(here, f"{path!r} is no absolute path")
    if any(below(path, (own,)) or below(own, (path,)) for own in HOST_ONLY):
        raise PeerError(here, f"{path} never comes from home")


def _judge_owner(owner: Owner, here: str) -> None:
    if owner.uid == 0:
        raise PeerError(here, "takes no guests of root")
    try:
        account = pwd.getpwnam(owner.name)
    except KeyError:
        raise PeerError(
            here, f"has no account {owner.name}", "create it with the same uid"
        ) from None
    if account.pw_uid != owner.uid:
        raise PeerError(
            here,
            f"{owner.name} has uid {account.pw_uid} there, but {owner.uid} at home",
            "give the account the same uid on both hosts",
        )
    allowed = set(os.getgrouplist(owner.name, account.pw_gid))
    extra = {owner.gid, *owner.groups} - allowed
    if extra:
        raise PeerError(
            here,
            f"{owner.name} is not in group {', '.join(map(_group_name, sorted(extra)))} there",
            "choose another host, or add the user to the group",
        )


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
