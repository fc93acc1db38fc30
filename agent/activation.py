"""Sockets that systemd has opened for migd, which it starts when somebody connects (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

FIRST_FD = 3


def inherited_socket(
    name: str, environment: Mapping[str, str] = os.environ, first_fd: int = FIRST_FD
) -> socket.socket | None:
    """The listening socket that has this name in its unit (FileDescriptorName); None if there is none."""
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return None
    for number, found in enumerate(environment.get("LISTEN_FDNAMES", "").split(":")):
        if found == name and number < int(environment.get("LISTEN_FDS", "0")):
            os.set_inheritable(first_fd + number, False)
            return socket.socket(fileno=first_fd + number)
    return None
