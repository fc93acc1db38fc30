"""A client's connection with the migd of its host."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from migrate import messages, paths
from migrate.errors import HostError
from migrate.framing import MALFORMED, recv_frame, send_frame
from migrate.reaching import reach_migd


def ask(request: messages.Request) -> Iterator[messages.Reply]:
    """Send a request; yields progress and last the final reply.

    :raises HostError: migd is not running, or was lost before its final reply.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            reach_migd(sock, str(paths.MIGD_SOCKET))
            send_frame(sock, messages.encode(request))
        except OSError as error:
            raise HostError(
                "migd", f"cannot be reached ({error.strerror})", "start it: systemctl start migd"
            ) from None
        while True:
            try:
                frame = recv_frame(sock)
                reply = messages.decode_reply(frame) if frame is not None else None
            except (OSError, *MALFORMED) as error:
                raise HostError("migd", f"the connection broke ({error})") from None
            if reply is None:
                raise HostError(
                    "migd", "ended before it answered", "look with `migctl ps` what has happened"
                )
            yield reply
            if isinstance(reply, messages.FINAL):
                return
