"""The forced command of a peer's SSH connection: hands it to migd, and gets out of its way.

sshd starts it as the user `migrate`, by a line of authorized_keys that names the peer:

    python -I -S bridge.py NODE [SOCKET]

It passes its stdin and stdout to migd's peer socket, with the peer's name, and becomes a `cat` that
waits for that socket to be closed: sshd ends a connection when its command ends. From then on the
bytes flow between sshd and whoever holds the two descriptors. Standard library only, and of that
the least: it starts within every connection (`_socket`, because `socket` costs another 5 ms).
"""

import _socket
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PEER_SOCKET = "/run/migrate/peer.sock"
"""The same as migrate.paths.PEER_SOCKET; not imported, for speed (a test compares them)."""

EX_USAGE = 64
EX_UNAVAILABLE = 69
"""From sysexits.h: migd does not run here."""

RESTART_SECONDS = 5.0
"""The same as in migrate.reaching: how long a migd that is being restarted may take."""

_INT_BYTES = 4


def main(arguments: list[str]) -> None:
    """Becomes `cat`, or ends with an exit status and a line on stderr for the peer."""
    if len(arguments) not in (1, 2):
        _fail(EX_USAGE, "usage: bridge.py NODE [SOCKET]")
    path = arguments[1] if len(arguments) == 2 else PEER_SOCKET
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        _reach(sock, path)
        stdio = b"".join(fd.to_bytes(_INT_BYTES, sys.byteorder) for fd in (0, 1))
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, stdio)]
        sock.sendmsg([arguments[0].encode()], rights)
    except OSError as error:
        _fail(EX_UNAVAILABLE, f"migd is not running: {error.strerror}")
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(sock.fileno(), 0)
    os.dup2(null, 1)
    os.execv("/bin/cat", ["cat"])


def _reach(sock: _socket.socket, path: str) -> None:
    """Connect. A socket that is there, but nobody listens on, may be listened on again in a moment."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            sock.connect(path)
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _fail(status: int, reason: str) -> "NoReturn":
    os.write(2, f"migrate: {reason}\n".encode())
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
