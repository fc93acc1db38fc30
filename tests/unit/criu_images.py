"""Images of a small process of alice's as CRIU writes them, to change and to put into a directory."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from criu_hooks import image_kinds as kinds
from criu_hooks.protobuf_wire import Kind, encode_varint

COMMON = 0x54564319
UID, GID, GROUP = 1001, 1001, 100
PID, THREAD, CHILD = 73, 74, 75
MAGICS = {
    "core": 0x55053847,
    "inventory": 0x58313116,
    "files": 0x56303138,
    "mm": 0x57492820,
}
NAMESPACES = {f"{name}_ns_id": 1 for name in ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup")}


def encode(kind: Kind, **fields: Any) -> bytes:
    """A message. A value: a number, bytes, text, a list of them, or None: left out."""
    numbers = {name: number for number, name in kind.field_names.items()}
    out = b""
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                out += encode_varint(numbers[name] << 3) + encode_varint(value & (1 << 64) - 1)
            elif value is not None:
                blob = value.encode() if isinstance(value, str) else value
                out += encode_varint(numbers[name] << 3 | 2) + encode_varint(len(blob)) + blob
    return out


def image(name: str, *messages: bytes, rest: bytes = b"") -> bytes:
    """The contents of an image file."""
    kind = name.partition("-")[0].removesuffix(".img")
    magic = struct.pack("=I", MAGICS.get(kind, 0x12345678))
    head = magic if kind == "inventory" else struct.pack("=I", COMMON) + magic
    return head + b"".join(struct.pack("=I", len(m)) + m for m in messages) + rest


CREDS: dict[str, Any] = {
    **dict.fromkeys(("uid", "euid", "suid", "fsuid"), UID),
    **dict.fromkeys(("gid", "egid", "sgid", "fsgid"), GID),
    **{name: [0, 0] for name in ("cap_inh", "cap_prm", "cap_eff", "cap_amb")},
    "cap_bnd": [0xFFFFFFFF, 0x1FF],
    "secbits": 0,
    "groups": [GROUP, GID],
}


def creds(**changes: Any) -> bytes:
    """Alice's."""
    return encode(kinds.CREDS, **{**CREDS, **changes})


def thread_core(**changes: Any) -> bytes:
    """A thread of hers."""
    fields = {"futex_rla": 1 << 46, "futex_rla_len": 24, "sched_nice": 0, "sched_policy": 0}
    return encode(kinds.THREAD_CORE, **{**fields, "creds": creds(), **changes})


def task_core(**changes: Any) -> bytes:
    """What all threads have together."""
    unlimited = encode(kinds.RLIMIT, cur=(1 << 64) - 1, max=(1 << 64) - 1)
    none = encode(kinds.RLIMIT, cur=0, max=0)
    rlimits = encode(kinds.RLIMITS, rlimits=[unlimited] * 13 + [none, none, unlimited])
    fields = {"task_state": 1, "exit_code": 0, "comm": "python3", "rlimits": rlimits}
    return encode(
        kinds.TASK_CORE, **{**fields, "loginuid": 0xFFFFFFFF, "oom_score_adj": 0, **changes}
    )


def core(**changes: Any) -> bytes:
    """A core image's message; arguments: other parts of it."""
    fields = {"mtype": 1, "thread_info": b"", "tc": task_core(), "thread_core": thread_core()}
    return encode(kinds.CORE, **{**fields, **changes})


def regular(number: int, name: str | bytes, flags: int = 0, **changes: Any) -> bytes:
    """An open file with a name."""
    fields = {"id": number, "flags": flags, "pos": 0, "fown": fown(), "name": name, "mnt_id": None}
    return entry(1, number, reg=encode(kinds.REG, **{**fields, "mode": 0o100644, **changes}))


def fown(**changes: int) -> bytes:
    """Nobody is told by a signal."""
    return encode(
        kinds.FOWN, **{"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0, **changes}
    )


def entry(kind: int, number: int, **described: bytes) -> bytes:
    """An entry of files.img."""
    return encode(kinds.FILE, type=kind, id=number, **described)


def memory(program: int = 1, *vmas: bytes) -> bytes:
    """What a process maps."""
    return encode(kinds.MM, exe_file_id=program, vmas=list(vmas), dumpable=1)


def vma(shmid: int, status: int, **changes: Any) -> bytes:
    """A mapping."""
    fields = {"start": 0x400000, "end": 0x401000, "shmid": shmid, "status": status}
    return encode(kinds.VMA, **{**fields, "fdflags": 0, **changes})


def write(directory: Path, name: str, *messages: bytes, rest: bytes = b"") -> None:
    """Make an image, in the place of one that may be there."""
    (directory / name).write_bytes(image(name, *messages, rest=rest))


def write_process(directory: Path, *files: bytes) -> None:
    """Everything of one process with two threads; `files`: more entries of files.img."""
    write(directory, "inventory.img", encode(kinds.INVENTORY, img_version=2, root_ids=ids()))
    write(
        directory,
        "pstree.img",
        encode(kinds.PSTREE, pid=PID, ppid=0, pgid=PID, sid=PID, threads=[PID, THREAD]),
    )
    write(directory, f"ids-{PID}.img", ids(time_ns_id=2))
    write(directory, f"core-{PID}.img", core())
    write(directory, f"core-{THREAD}.img", core(tc=None))
    write(directory, f"mm-{PID}.img", memory())
    write(directory, f"fs-{PID}.img", encode(kinds.FS, cwd_id=2, root_id=3, umask=0o22))
    write(directory, "fdinfo-2.img", encode(kinds.FDINFO, id=4, flags=0, type=1, fd=0))
    own = [
        regular(1, "/usr/bin/python3.13", mode=0o100755),
        regular(2, "/home/alice", mode=0o40755),
        regular(3, "/", mode=0o40755),
        regular(4, "/dev/null", 2, mode=0o20666),
    ]
    write(directory, "files.img", *own, *files)
    for name in (f"pagemap-{PID}.img", "timens-0.img", "pipes-data.img", "seccomp.img"):
        write(directory, name)
    (directory / "pages-1.img").write_bytes(b"anything")


def ids(**changes: int) -> bytes:
    """Of the kernel's objects that a task has."""
    fields = {"vm_id": 1, "files_id": 1, "fs_id": 1, "sighand_id": 1, **NAMESPACES}
    return encode(kinds.IDS, **{**fields, "time_ns_id": 1, **changes})
