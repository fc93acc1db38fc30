"""Images from another host, before CRIU obeys them as root: hostile until they were looked through.

What is here is decided by what the images say alone. What is to be looked up in the capsule — whether the
owner may open a file — comes out as a list (see criu_hooks/owner_rights.py).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass

from criu_hooks import image_kinds as kinds
from criu_hooks.image_entries import OpenFiles
from criu_hooks.image_format import INVENTORY, Image, ImageError, take_message
from criu_hooks.image_memory import read_memory
from criu_hooks.image_names import Wanted
from criu_hooks.images import Owner, check_task
from criu_hooks.protobuf_wire import Fields, Kind

# What a dump of a guest consists of. Not here, so refused: mounts, networks and other namespaces, cgroups'
# properties of old, TCP connections, System V objects, and all that older CRIUs knew.
_NUMBERED = re.compile(
    r"(core|ids|mm|fs|fdinfo|timens|pages|pagemap|pagemap-shmem)-(0|[1-9][0-9]*)\.img|"
    r"(ghost-file)-(0|[1-9a-f][0-9a-f]*)\.img"
)
_SINGLE = frozenset(
    f"{name}.img"
    for name in (
        *("inventory", "pstree", "files", "remap-fpath", "memfd", "pipes-data", "fifo-data"),
        *(
            "sk-queues",
            "tty-info",
            "tty-data",
            "filelocks",
        ),
        *("cgroup", "seccomp"),  # not obeyed: CRIU is told to ignore cgroups; no task has a filter
    )
)
_NAMESPACES = tuple(
    f"{name}_ns_id" for name in ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup")
)
"""Time namespaces may differ: CRIU keeps the monotonic clocks going by them."""
_IMG_VERSION = 2
_RUN_ID = re.compile(rb"[0-9a-f-]{0,64}")
_GHOST, _LINKED = 1, 0
_TTY_TYPES = (1, 4, 5)
"""PTY, CTTY, EXT_TTY"""
_GHOST_TYPES = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFDIR)
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True)
class Checked:
    """What is left to look at."""

    wanted: tuple[Wanted, ...]
    """what must be true of files in the capsule"""
    mapped: frozenset[int]
    """ids of files that a process maps or was started from"""


class _Images:
    def __init__(self, directory_fd: int, owner: Owner) -> None:
        self.fd = directory_fd
        self.owner = owner
        self.numbered: dict[str, list[str]] = {}
        for entry in os.scandir(directory_fd):
            if entry.name.endswith(".img") and entry.name not in _SINGLE:
                found = _NUMBERED.fullmatch(entry.name)
                if found is None:
                    raise ImageError(f"{entry.name} is no image that a guest has")
                self.numbered.setdefault(found[1] or found[3], []).append(entry.name)

    def each(self, kind: Kind, *names: str) -> list[Fields]:
        """Every message in these images, none of an image that does not exist."""
        return [kind.read(message) for name in names for message in self._messages(name)]

    def of_each(self, prefix: str, kind: Kind) -> list[Fields]:
        return self.each(kind, *self.numbered.get(prefix, ()))

    def _messages(self, name: str) -> list[bytes]:
        try:
            return Image.read(self.fd, name).messages
        except FileNotFoundError:
            return []

    def pids(self) -> frozenset[int]:
        """Of all tasks and threads."""
        tasks = self.each(kinds.PSTREE, "pstree.img")
        return frozenset(
            pid for task in tasks for pid in (task.number("pid"), *task.lists.get("threads", ()))
        )

    def check_tasks(self) -> None:
        names = self.numbered.get("core")
        if not names:
            raise ImageError("no process is in the images")
        for name in sorted(names):
            check_task(self.fd, name, self.owner)

    def check_namespaces(self) -> None:
        """CRIU makes new ones for who is not in its own, and mounts and configures them as it is told."""
        inventories = self.each(kinds.INVENTORY, INVENTORY)
        if len(inventories) != 1 or inventories[0].number("img_version") != _IMG_VERSION:
            raise ImageError("the inventory is none of this CRIU's")
        inventory = inventories[0]
        if not _RUN_ID.fullmatch(inventory.blobs.get("dump_criu_run_id", b"")):
            raise ImageError("the inventory has a strange name of its dump")
        own = kinds.IDS.read(inventory.blobs.get("root_ids", b""))
        for ids in self.of_each("ids", kinds.IDS):
            if any(ids.numbers.get(name) != own.numbers.get(name) for name in _NAMESPACES):
                raise ImageError("a process has namespaces of its own")

    def check_files(self) -> Checked:
        files = OpenFiles(self.owner, self.pids())
        for message in self._messages("files.img"):
            files.add(message)
        memories = [read_memory(self.fd, name) for name in self.numbered.get("mm", ())]
        accesses = {memory.program: os.R_OK for memory in memories}
        for memory in memories:
            for number, access in memory.accesses.items():
                accesses[number] = accesses.get(number, 0) | access
        entered = set()
        for directories in self.of_each("fs", kinds.FS):
            files.check_root(directories.number("root_id"))
            entered |= {directories.number("cwd_id"), directories.number("root_id")}
        opened = {fdinfo.number("id") for fdinfo in self.of_each("fdinfo", kinds.FDINFO)}
        only_entered = frozenset(entered - opened - accesses.keys())
        files.check_regular(accesses, only_entered, self._remaps())
        return Checked(tuple(dict.fromkeys(files.wanted)), frozenset(accesses))

    def _remaps(self) -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        for remap in self.each(kinds.REMAP, "remap-fpath.img"):
            kind = remap.numbers.get("remap_type")
            if kind not in (_GHOST, _LINKED) or remap.number("orig_id") in found:
                raise ImageError("a file has lost its name in an unknown way")
            number = remap.number("orig_id")
            found[number] = remap.number("remap_id") if kind == _LINKED else None
        return found

    def check_contents(self) -> None:
        """Files whose contents are in the images are the owner's and have no special rights."""
        for name in self.numbered.get("ghost-file", ()):
            ghosts = [kinds.GHOST.read(m) for m in Image.read(self.fd, name, True).messages]
            for ghost in ghosts:
                if stat.S_IFMT(ghost.number("mode")) not in _GHOST_TYPES:
                    raise ImageError(f"{name} is no plain file")
                self._check_inode(name, ghost)
        for inode in self.each(kinds.MEMFD_INODE, "memfd.img"):
            self._check_inode("memfd.img", inode)
        for tty in self.each(kinds.TTY_INFO, "tty-info.img"):
            if tty.number("type") not in _TTY_TYPES:
                raise ImageError("a terminal is one of the host's own")
            if tty.numbers.get("uid", self.owner.uid) != self.owner.uid:
                raise ImageError("a terminal belongs to another user")
        self._check_queues()

    def _check_inode(self, name: str, inode: Fields) -> None:
        if inode.number("uid") != self.owner.uid or inode.number("gid") not in self.owner.gids:
            raise ImageError(f"{name} holds a file of another user")
        if inode.number("mode") & _SPECIAL_BITS:
            raise ImageError(f"{name} holds a file with special rights")

    def _check_queues(self) -> None:
        """What waits in sockets: bytes, no descriptors."""
        name = "sk-queues.img"
        try:
            data = Image.read(self.fd, name, True)
        except FileNotFoundError:
            return
        rest = b"".join(len(m).to_bytes(4, "little") + m for m in data.messages) + data.rest
        at = 0
        while at < len(rest):
            message, at = take_message(rest, at, name)
            packet = kinds.SOCKET_PACKET.read(message)
            if packet.blob_lists.get("scm"):
                raise ImageError("descriptors are on their way through a socket")
            at += packet.number("length")


def check_images(directory_fd: int, owner: Owner) -> Checked:
    """Refuse images that no honest host would send for this owner's tree.

    :param directory_fd: of the directory with the images, which nobody else changes.
    :raises ImageError: with the first thing that must not be.
    """
    images = _Images(directory_fd, owner)
    images.check_tasks()
    images.check_namespaces()
    images.check_contents()
    return images.check_files()
