"""What images say about rights, checked before CRIU obeys them: they come from another host.

What the owner could not have of this host by herself is refused; a priority or protection above the
ordinary, which its own root has given the process elsewhere, is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import Image, ImageError
from criu_hooks.protobuf_wire import Fields, encode_varint, replace

TASK_DEAD = 2
"""A zombie (compel's task-state.h)."""
_ORDINARY_POLICIES = (0, 3, 5)
"""SCHED_OTHER, SCHED_BATCH, SCHED_IDLE"""
_SCHED_RESET_ON_FORK = 0x40000000
_RLIMITS_CAPPED = {13: 20, 14: 0}
"""RLIMIT_NICE and RLIMIT_RTPRIO, to what raises no priority"""
_NO_LOGIN = 0xFFFFFFFF
_TC, _THREAD_CORE, _RLIMITS, _LOGINUID, _OOM, _NICE = 3, 5, 8, 13, 14, 3
"""numbers of fields"""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose every process must be."""

    uid: int
    gids: frozenset[int]
    """of which they may have any"""
    oom_score_adj: int = 0
    """the best protection from the kernel's out-of-memory killer that they may have: at most 0 (proc(5))"""


def check_task(directory_fd: int, name: str, owner: Owner) -> None:
    """A thread in the images has this user's ids, only these groups, and no capabilities.

    :param directory_fd: of the directory with the images.
    :param name: of its core image.
    :raises ImageError: it has more.
    """
    image = Image.read(directory_fd, name)
    if not image.messages:
        raise ImageError(f"{name} is cut off")
    messages = [_checked(name, message, owner) for message in image.messages]
    if messages != image.messages:
        image.messages = messages
        image.write(directory_fd, name)


def _checked(name: str, message: bytes, owner: Owner) -> bytes:
    core = kinds.CORE.read(message)
    task = kinds.TASK_CORE.read(core.blobs.get("tc", b""))
    thread_data = core.blobs.get("thread_core")
    if thread_data is None:
        if task.number("task_state") == TASK_DEAD:
            return (
                message  # CRIU makes a process that only ends as it did; it has no owner any more
            )
        raise ImageError(f"{name} names no owner")
    thread = kinds.THREAD_CORE.read(thread_data)
    if "creds" not in thread.blobs:
        raise ImageError(f"{name} names no owner")
    _check_creds(name, kinds.CREDS.read(thread.blobs["creds"]), owner)
    if task.number("old_seccomp_mode") or thread.number("seccomp_mode"):
        raise ImageError(f"{name} has a seccomp filter")
    policy = thread.number("sched_policy") & ~_SCHED_RESET_ON_FORK
    if policy not in _ORDINARY_POLICIES or thread.number("sched_prio"):
        raise ImageError(f"{name} has a realtime priority")
    if thread.number("sched_nice") & 1:  # zigzag: a negative number
        message = replace(message, _THREAD_CORE, replace(thread_data, _NICE, b"\0"))
    if "tc" in core.blobs:
        message = replace(message, _TC, _ordinary(core.blobs["tc"], task, owner))
    return message


def _check_creds(name: str, creds: Fields, owner: Owner) -> None:
    uids = {creds.numbers.get(field) for field in ("uid", "euid", "suid", "fsuid")}
    if uids != {owner.uid}:
        raise ImageError(f"{name} belongs to another user than the offer said")
    gids = {creds.numbers.get(field) for field in ("gid", "egid", "sgid", "fsgid")}
    if not {*gids, *creds.lists.get("groups", ())} <= owner.gids:
        raise ImageError(f"{name} is in a group that its user is not in")
    for field in ("cap_inh", "cap_prm", "cap_eff", "cap_amb"):
        if any(creds.lists.get(field, ())):
            raise ImageError(f"{name} has capabilities")
    if creds.number("secbits"):
        raise ImageError(f"{name} has securebits")
    if any(creds.blobs.get(field) for field in ("lsm_profile", "lsm_sockcreate", "apparmor_data")):
        raise ImageError(f"{name} has a security label")


def _ordinary(data: bytes, task: Fields, owner: Owner) -> bytes:
    """A task_core without what its own host's root has added."""
    if task.numbers.get("loginuid", _NO_LOGIN) not in (owner.uid, _NO_LOGIN):
        data = replace(data, _LOGINUID, None)
    if _signed(task.number("oom_score_adj")) < owner.oom_score_adj:
        data = replace(data, _OOM, encode_varint(owner.oom_score_adj & (1 << 64) - 1))
    if "rlimits" in task.blobs:
        data = replace(data, _RLIMITS, _capped(task.blobs["rlimits"]))
    return data


def _capped(data: bytes) -> bytes:
    limits = kinds.RLIMITS.read(data).blob_lists.get("rlimits", [])
    out = b""
    for resource, message in enumerate(limits):
        if (cap := _RLIMITS_CAPPED.get(resource)) is not None:
            limit = kinds.RLIMIT.read(message)
            words = (min(limit.number("cur"), cap), min(limit.number("max"), cap))
            message = b"".join(
                encode_varint(number << 3) + encode_varint(word)
                for number, word in enumerate(words, 1)
            )
        out += b"\x0a" + encode_varint(len(message)) + message
    return out


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
