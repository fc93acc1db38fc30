"""Terminals in the images that the receiver provides (CRIU: external ttys).

CRIU insists on restoring an external terminal as the controlling one of a session, and fails when
the images hold no leader of that session. Where the guest's shell stayed behind, session and
foreground are the keeper's to make (agent/session.py): CRIU is told that there is none.
"""

from __future__ import annotations

import os
import struct

from pycriu.images import tty_pb2

from criu_hooks.image_format import MAX_MESSAGE_BYTES, ImageError, take_message

NAME = "tty-info.img"
_MAGICS_BYTES = 8
_U32 = struct.Struct("=I")


def adopt_terminals(directory_fd: int, session_leader: int, foreground: int) -> None:
    """Rewrite the image of terminals, if there is one.

    :param directory_fd: of the directory with the images.
    :param session_leader: a process in the images, which CRIU shall give its controlling terminal;
        0: none.
    :param foreground: the group that shall have the terminal then; 0: the leader's own.
    :raises ImageError: the image cannot be read.
    """
    try:
        fd = os.open(NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    except FileNotFoundError:
        return
    with open(fd, "r+b") as file:
        data = file.read(MAX_MESSAGE_BYTES)
        rewritten = data[:_MAGICS_BYTES]
        at = _MAGICS_BYTES
        while at < len(data):
            message, at = take_message(data, at, NAME)
            try:
                entry = tty_pb2.tty_info_entry.FromString(message)
            except Exception as error:
                raise ImageError(f"{NAME} cannot be read") from error
            if entry.type == tty_pb2.EXT_TTY:
                leads = bool(session_leader) and entry.sid == session_leader
                entry.sid = session_leader if leads else 0
                entry.pgrp = (foreground or session_leader) if leads else 0
            message = entry.SerializeToString()
            rewritten += _U32.pack(len(message)) + message
        file.seek(0)
        file.truncate()
        file.write(rewritten)
