"""The status of an open file, asked in a way that can not hang on a network file system."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_BASIC_STATS = 0x7FF
_STATX_SIZE = 256
# <linux/stat.h>, struct statx: from stx_nlink (16) to stx_dev_minor (140)
_FIELDS = struct.Struct("=I8xH2xQQQ8x64xIIII")
_FIELDS_OFFSET = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What statx(2) says of one file."""

    mode: int
    """type and permissions, as in st_mode"""
    links: int
    """number of names; 0: deleted"""
    inode: int
    device: int
    """where the file lies, as in st_dev"""
    special_device: int
    """which device the file is, as in st_rdev; 0 for others"""
    size_bytes: int
    stored_bytes: int
    """what it occupies: the measure that CRIU compares with its ghost limit"""


def statx(path: str, dir_fd: int = AT_FDCWD) -> FileStatus:
    """Status of `path`, following links; a FUSE or NFS server is not asked (AT_STATX_DONT_SYNC).

    :raises OSError: as stat(2) does.
    """
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    failed = _libc.statx(dir_fd, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_BASIC_STATS, buffer)
    if failed:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    links, mode, inode, size, blocks, rmajor, rminor, major, minor = _FIELDS.unpack_from(
        buffer, _FIELDS_OFFSET
    )
    return FileStatus(
        mode=mode,
        links=links,
        inode=inode,
        device=os.makedev(major, minor),
        special_device=os.makedev(rmajor, rminor),
        size_bytes=size,
        stored_bytes=blocks * 512,
    )
