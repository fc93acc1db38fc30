"""The open files in the images, entry by entry: what CRIU, as root, may not open for a guest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import ImageError
from criu_hooks.image_names import Wanted, checked, making, opening, terminal, wanted_access
from criu_hooks.image_sockets import check_inet, check_unix
from criu_hooks.images import Owner
from criu_hooks.protobuf_wire import Fields, Kind

_NO_MOUNT = 1
"""-1 in zigzag: mounts are not part of the images"""
_NO_PROCESS = (1 << 64) - 1
_REG = 1
# The field that describes each kind of file, by enum fd_types (images/fdinfo.proto). Not here, so
# refused: packet and netlink sockets, fanotify, namespaces, tun devices, files of plugins, BPF maps.
_KINDS: dict[int, tuple[str, Kind]] = {
    _REG: ("reg", kinds.REG),
    2: ("pipe", kinds.PIPE),
    3: ("fifo", kinds.FIFO),
    4: ("isk", kinds.INET),
    5: ("usk", kinds.UNIX),
    6: ("efd", kinds.EVENTFD),
    7: ("epfd", kinds.EPOLL),
    8: ("ify", kinds.INOTIFY),
    9: ("sgfd", kinds.SIGNALFD),
    11: ("tty", kinds.TTY),
    17: ("tfd", kinds.TIMERFD),
    18: ("memfd", kinds.MEMFD),
    20: ("pidfd", kinds.PIDFD),
}


@dataclass
class OpenFiles:
    """The entries of files.img."""

    owner: Owner
    pids: frozenset[int]
    """of the tasks and threads in the images"""
    regular: dict[int, list[Fields]] = field(default_factory=dict)
    """by id, of which there should be one"""
    terminals: set[int] = field(default_factory=set)
    """ids of the regular entries that terminals are opened by"""
    wanted: list[Wanted] = field(default_factory=list)

    def add(self, message: bytes) -> None:
        """Check an entry as far as it tells by itself. Raises ImageError."""
        entry = kinds.FILE.read(message)
        name, kind = _KINDS.get(entry.number("type"), ("", kinds.FILE))
        if not name or set(entry.blobs) != {name}:
            raise ImageError(f"a file is of a kind that no guest has ({entry.number('type')})")
        file = kind.read(entry.blobs[name])
        if "fown" in file.blobs:
            self._check_signals(kinds.FOWN.read(file.blobs["fown"]))
        match name:
            case "reg":
                self.regular.setdefault(file.number("id"), []).append(file)
            case "isk":
                check_inet(file)
            case "usk":
                if (name_wanted := check_unix(file, self.owner)) is not None:
                    self.wanted.append(name_wanted)
            case "ify":
                self._check_watches(file)
            case "tty":
                self.terminals.add(file.numbers.get("regf_id", file.number("id")))
            case "pidfd":
                if file.number("nspid") not in (*self.pids, _NO_PROCESS):
                    raise ImageError("a pidfd is of a process outside of the images")

    def _check_signals(self, receiver: Fields) -> None:
        """Whom a file tells by a signal: as the owner, who may not reach everybody."""
        if receiver.number("pid") and {receiver.number("uid"), receiver.number("euid")} != {
            self.owner.uid
        }:
            raise ImageError("a file sends signals as another user")

    def _check_watches(self, file: Fields) -> None:
        for message in file.blob_lists.get("wd", ()):
            watch = kinds.INOTIFY_WATCH.read(message)
            handle = kinds.FILE_HANDLE.read(watch.blobs.get("f_handle", b""))
            if not (path := handle.path("path")):
                raise ImageError("a watch names no path")
            self._want(opening(path, os.R_OK, self.pids))

    def _want(self, wanted: Wanted | None) -> None:
        if wanted is not None:
            self.wanted.append(wanted)

    def check_regular(
        self, accesses: dict[int, int], only_entered: frozenset[int], remaps: dict[int, int | None]
    ) -> None:
        """Check the entries of files with names.

        :param accesses: by ids, what mapping them takes.
        :param only_entered: ids of working directories that nobody has open.
        :param remaps: ids of files that have lost their name → of the one they have instead; None:
            their contents are in the images.
        :raises ImageError: a file that no guest may have.
        """
        for number, file in self._each():
            path = file.path("name")
            if file.number("ext") or file.numbers.get("mnt_id", _NO_MOUNT) != _NO_MOUNT:
                raise ImageError(f"{checked(path)} is said to be on a mount of its own")
            access = wanted_access(file.number("flags")) | accesses.get(number, 0)
            if number in self.terminals:
                self._want(terminal(path, file.number("mode")))
            if number in remaps:
                self.wanted.append(making(path))
            elif number in only_entered:
                self._want(opening(path, os.X_OK, self.pids))
            else:
                self._want(opening(path, access, self.pids))
        for number, other in remaps.items():
            if other is not None:
                self.wanted += [making(file.path("name")) for file in self.regular.get(other, ())]
                if number == other:
                    raise ImageError("a file is its own other name")

    def check_root(self, number: int) -> None:
        """The root directory of a process is the capsule's. Raises ImageError."""
        files = self.regular.get(number, ())
        if not files or any(file.path("name") != "/" for file in files):
            raise ImageError("a process has another root directory")

    def _each(self) -> Iterator[tuple[int, Fields]]:
        for number, files in self.regular.items():
            for file in files:
                yield number, file
