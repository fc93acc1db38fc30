"""What images from another host must pass before CRIU restores them. For a worker of one restore."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from criu_hooks.calls import RestoreRequest
from criu_hooks.image_check import Checked, check_images
from criu_hooks.image_files import forget_sizes
from criu_hooks.image_format import ImageError
from criu_hooks.images import Owner
from criu_hooks.mount_links import enter_mounts, no_links_followed
from criu_hooks.mounts import parse_mountinfo
from criu_hooks.owner_rights import check_wanted
from criu_hooks.terminal_images import adopt_terminals

PRE_RESTORE = "pre-restore"
"""CRIU's notification when it has read the images, but has opened nothing that they name."""


class ImageGate:
    """A context manager: from `PRE_RESTORE` on to its end no link is followed in CRIU's mounts.

    The calling process has one thread; `read` moves it into these mounts for good.
    """

    def __init__(self, request: RestoreRequest, images_fd: int, mounts_fd: int) -> None:
        self._request = request
        self._images_fd = images_fd
        self._mounts_fd = mounts_fd
        self._owner = Owner(request.uid, frozenset(request.gids), min(0, _own_oom_score_adj()))
        self._checked = Checked((), frozenset())
        self._passed = False
        self._self_fd = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        """of the host's /proc: the capsule's does not know us"""
        self._stack = ExitStack()
        for fd in (images_fd, mounts_fd, self._self_fd):
            self._stack.callback(os.close, fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self) -> None:
        """Look through the images, and adapt them to this host.

        :raises ImageError: they are refused.
        """
        self._checked = check_images(self._images_fd, self._owner)
        forget_sizes(self._images_fd, self._request.view, self._checked.mapped)
        adopt_terminals(self._images_fd, self._request.session_leader, self._request.foreground)
        enter_mounts(self._mounts_fd)

    def pass_by(self, point: str) -> None:
        """CRIU is at this notification: at `PRE_RESTORE`, look at the files that the images name.

        :raises ImageError: the owner may not have one; or CRIU is further, and did not stop there.
        """
        if point == PRE_RESTORE:
            try:
                self._check_files()
            except OSError as error:
                raise ImageError(f"their files cannot be looked at: {error}") from error
            self._passed = True
        elif not self._passed:
            raise ImageError("CRIU did not wait until their files were looked at")

    def _check_files(self) -> None:
        self._stack.enter_context(no_links_followed())
        fd = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._self_fd)
        with open(fd) as file:
            mounts = parse_mountinfo(file.read())
        gid = self._request.gids[0]
        check_wanted(self._checked.wanted, self._owner, gid, mounts, self._request.view_device)

    def log(self) -> str:
        """What CRIU has written; "" if nothing."""
        name = Path(self._request.log_path).name
        try:
            with open(os.open(name, os.O_RDONLY, dir_fd=self._images_fd), errors="replace") as log:
                return log.read()
        except OSError:
            return ""


def _own_oom_score_adj() -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())
