"""A mount namespace in which no symbolic link is followed for a while (mount_setattr(2), Linux 5.14).

CRIU opens as root what images name. The names come from the kernel, so no link lies on their way: who
lays one there, between the check and CRIU's open, wants to lead it elsewhere. Home can, at any moment:
it serves the view.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_MOUNT_SETATTR = 442
"""on x86_64 and aarch64"""
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_NOSYMFOLLOW = 0x200000
_LINKS_NEEDED = ("/proc", True), ("/dev", False)
"""Where CRIU itself follows links, with what is mounted there or without; names of files in them are
checked as text (criu_hooks/image_names.py)."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def enter_mounts(mount_fd: int) -> None:
    """Move the calling process, of one thread, into a mount namespace. Raises OSError."""
    if _libc.setns(mount_fd, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "setns")


@contextmanager
def no_links_followed() -> Iterator[None]:
    """Inside, no link in the caller's mount namespace leads anywhere, but for those in /proc and /dev.

    :raises OSError: the kernel is too old.
    """
    _set("/", _NOSYMFOLLOW, 0, recursive=True)
    try:
        for path, recursive in _LINKS_NEEDED:
            _allow(path, recursive)
        yield
    finally:
        _allow("/", recursive=True)


def _allow(path: str, recursive: bool) -> None:
    with suppress(FileNotFoundError):
        try:
            _set(path, 0, _NOSYMFOLLOW, recursive)
        except OSError as error:
            if error.errno != 22:  # it is a plain directory of what lies around it
                raise


def _set(path: str, attributes: int, cleared: int, recursive: bool) -> None:
    name = ctypes.create_string_buffer(os.fsencode(path))
    wanted = (ctypes.c_uint64 * 4)(attributes, cleared, 0, 0)
    words = (_MOUNT_SETATTR, _AT_FDCWD, ctypes.addressof(name), _AT_RECURSIVE if recursive else 0)
    if _libc.syscall(
        *map(ctypes.c_long, words), ctypes.byref(wanted), ctypes.c_size_t(ctypes.sizeof(wanted))
    ):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
