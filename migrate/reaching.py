"""Reaching migd's sockets, also in the moment in which it is being restarted. Imports next to nothing."""

from __future__ import annotations

from time import monotonic, sleep

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    import _socket

RESTART_SECONDS = 5.0
"""agent/bridge.py has the same for peers; not imported there, for speed."""
_RETRY_SECONDS = 0.05


def reach_migd(sock: _socket.socket, path: str) -> None:
    """Connect. A socket that is there, but nobody listens on, may be listened on again in a moment.

    :raises OSError: it has never been there since the boot, or migd does not come back.
    """
    deadline = monotonic() + RESTART_SECONDS
    while True:
        try:
            sock.connect(path)
            return
        except ConnectionRefusedError:
            if monotonic() > deadline:
                raise
        sleep(_RETRY_SECONDS)
