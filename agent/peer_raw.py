"""Raw connections to a peer, for bulk data and lifelines: the system's ssh as a child process.

Unlike a paramiko channel, such a connection is two plain descriptors that can be handed to another
process, and it lives on when migd ends. agent.peer_pool opens them.
"""

import asyncio
import os
import select
import signal
import subprocess

from agent.peer_errors import AnswerLost, PeerUnreachable, one_line
from agent.peer_hello import HELLO_LIMIT_BYTES, Purpose, encode_word
from agent.peer_identity import Identity
from migrate.config import Host
from migrate.errors import PeerError
from migrate.framing import encode_frame

SSH = "/usr/bin/ssh"
_STDERR_LIMIT_BYTES = 4096
_LOST = "the connection was lost"


def ssh_command(peer: Host, identity: Identity) -> list[str]:
    """The command line that connects to the peer's migd: nothing of it is the user's to change.

    The host key is looked up by the peer's name in the cluster, whatever its address.
    """
    options = (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        f"UserKnownHostsFile={identity.known_hosts}",
        "GlobalKnownHostsFile=/dev/null",
        f"HostKeyAlias={peer.name}",
        "CheckHostIP=no",
        "UpdateHostKeys=no",
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "PreferredAuthentications=publickey",
        # The fastest where both have AES in hardware; the others for hosts that have not.
        "Ciphers=aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com",
        "Compression=no",
        "ControlMaster=no",
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "LogLevel=ERROR",
    )
    command = [SSH, "-F", "none", "-T", "-i", str(identity.key_file)]
    for option in options:
        command += ["-o", option]
    return [*command, "-p", str(peer.port), "-l", identity.user, "--", peer.address, "raw"]


class RawConnection:
    """A connection to the peer's migd, greeted; `begin` says what it is for.

    `fd_in` and `fd_out` are blocking sockets, one a direction (shutdown(2) ends one alone).
    """

    def __init__(
        self, peer: Host, process: subprocess.Popen[bytes], fd_in: int, fd_out: int, fd_err: int
    ) -> None:
        self.peer = peer
        self.process = process
        self.fd_in = fd_in
        self.fd_out = fd_out
        self.ended = asyncio.Event()
        """Set when ssh has ended and is reaped."""
        self.told_to_end = False
        self.made_at = 0.0
        """When it was greeted, in the loop's time."""
        self.greeted = False
        """Whether the peer's migd has answered on it."""
        self._fd_err = fd_err
        self._closed = False

    def begin(self, purpose: str, token: str) -> None:
        """Send the Purpose: what is written next goes to the process that the peer picks by it.

        :raises PeerUnreachable: the connection is gone.
        """
        frame = encode_frame(encode_word(Purpose(purpose, token)), HELLO_LIMIT_BYTES)
        try:
            _write_all(self.fd_out, frame)
        except OSError as error:
            raise PeerUnreachable(f"host {self.peer.name}", _LOST) from error

    def alive(self) -> bool:
        """Whether it still stands, as far as this host can know; only before `begin`."""
        if self._closed or self.process.poll() is not None:
            return False
        poll = select.poll()
        poll.register(self.fd_in, select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def failure(self) -> PeerError:
        """Why ssh has not connected, or has ended: from what it printed and its exit status."""
        text = os.pread(self._fd_err, _STDERR_LIMIT_BYTES, 0).decode(errors="replace")
        if self.greeted:
            return AnswerLost(f"host {self.peer.name}", _last_line(text) or _LOST)
        return explain_ssh(self.peer.name, self.process.poll(), text)

    def detach(self) -> None:
        """Close our copies of the descriptors after another process has got them; ssh runs on."""
        if not self._closed:
            self._closed = True
            for fd in (self.fd_in, self.fd_out, self._fd_err):
                os.close(fd)

    def close(self) -> None:
        """End the connection. Does nothing after `detach`."""
        if not self._closed:
            self.detach()
            self.told_to_end = True
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)


def explain_ssh(peer: str, status: int | None, text: str) -> PeerUnreachable:
    """One sentence of what ssh and the bridge told: for a person who knows neither."""
    what = f"host {peer}"
    lower = text.lower()
    if status == 69:
        return PeerUnreachable(what, "migd is not running there", "start it: systemctl start migd")
    if status in (126, 127):
        return PeerUnreachable(what, "migrate is not installed there", _join(peer))
    if "remote host identification has changed" in lower:
        return PeerUnreachable(what, "it shows another host key than before", _join(peer))
    if "host key verification failed" in lower or "host key is known" in lower:
        return PeerUnreachable(what, "its host key is not known", _join(peer))
    if "permission denied" in lower:
        return PeerUnreachable(what, "it does not accept this host's key", _join(peer))
    for sign in ("connection refused", "no route to host", "network is unreachable", "timed out"):
        if sign in lower:
            return PeerUnreachable(what, f"unreachable: {sign}", "is it up, and its sshd?")
    if "could not resolve" in lower:
        return unresolvable(peer)
    if not text.strip():
        return turned_away(peer)
    return PeerUnreachable(what, _last_line(text))


def unresolvable(peer: str) -> PeerUnreachable:
    """Its address is a name that DNS does not know."""
    reason = "the name in its address cannot be resolved"
    return PeerUnreachable(f"host {peer}", reason, "correct its address in config.toml")


def turned_away(peer: str) -> PeerUnreachable:
    """sshd closes the connection without a word, as it does after failures (PerSourcePenalties)."""
    reason = "its sshd ended the connection at once"
    remedy = "after failed attempts it refuses a host for a while; see sshd's log there"
    return PeerUnreachable(f"host {peer}", reason, remedy)


def _join(peer: str) -> str:
    return f"run `migctl join {peer}`"


def _last_line(text: str) -> str:
    return one_line(text.strip().rpartition("\n")[2])


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
