"""Home's end of the home view: an sftp-server run as the owner, on a stream of the lifeline."""

from __future__ import annotations

import os
import socket
import subprocess

from agent.endpoints import Duplex
from agent.guestwords import VIEW_STREAM
from agent.lifeline import Lifeline
from agent.link import Owner
from agent.reactor import Reactor
from migrate.errors import HostError

SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
)
VIEW_WINDOW = 4 << 20


class ViewServer:
    """Serves the owner's view of this host's files for as long as it is open.

    It has the owner's rights and no more: what the far side asks for is what the owner could do
    here herself.
    """

    def __init__(self, reactor: Reactor, lifeline: Lifeline, owner: Owner) -> None:
        server = next((path for path in SFTP_SERVERS if os.access(path, os.X_OK)), None)
        if server is None:
            raise HostError("sftp-server", "is not installed", "install openssh-sftp-server")
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [server, "-e"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": "/usr/bin:/bin"},
                user=owner.uid,
                group=owner.gid,
                extra_groups=list(owner.groups),
                umask=0,
                start_new_session=True,
            )
        self._duplex = Duplex(reactor, lifeline.open(VIEW_STREAM, VIEW_WINDOW), ours.detach())

    def close(self) -> None:
        """End it. Whatever the guest still has open there is gone."""
        self._duplex.close()
        self._process.kill()
        self._process.wait()
