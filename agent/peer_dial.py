"""Connecting to a peer's migd with paramiko: blocking, for a thread of its own."""

import logging
import socket
import time
from dataclasses import dataclass

import paramiko

from agent.peer_errors import PeerUnreachable
from agent.peer_hello import HELLO_LIMIT_BYTES, Hello, check_answer, encode_word
from agent.peer_identity import Identity, Patience
from agent.peer_raw import explain_ssh, turned_away, unresolvable
from migrate.config import Host
from migrate.errors import HostError
from migrate.framing import FrameError, recv_frame, send_frame

LOG_CHANNEL = "migrate.ssh"
# paramiko logs tracebacks of what is told to the caller anyway.
logging.getLogger(LOG_CHANNEL).setLevel(logging.CRITICAL + 1)

_STDERR_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class Line:
    """A connection whose peer has greeted us; `close` ends it and its thread (blocks a little)."""

    client: paramiko.SSHClient
    channel: paramiko.Channel
    hello: Hello

    def close(self) -> None:
        self.client.close()


class _UnknownHostKey(paramiko.SSHException):
    """The peer shows a key of a kind that we hold none of."""


class _Reject(paramiko.MissingHostKeyPolicy):
    def missing_host_key(
        self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey
    ) -> None:
        raise _UnknownHostKey


def connect_tcp(peer: Host, seconds: float) -> socket.socket:
    """A TCP connection to the peer's sshd.

    :raises PeerUnreachable: there is none within `seconds`.
    """
    try:
        sock = socket.create_connection((peer.address, peer.port), seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except socket.gaierror as error:
        raise unresolvable(peer.name) from error
    except OSError as error:
        reason = "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise PeerUnreachable(
            f"host {peer.name}",
            f"unreachable at {peer.address} port {peer.port}: {reason.lower()}",
            "is it up, and its sshd?",
        ) from error
    return sock


def dial(
    peer: Host, own: Hello, identity: Identity, patience: Patience, sock: socket.socket
) -> Line:
    """Over `sock`: authenticate both ways, start a channel, exchange greetings. Owns `sock`.

    :raises PeerUnreachable: at any of these; the reason says which.
    :raises HostError: this host lacks its key or the file of known hosts.
    """
    what, seconds, begun = f"host {peer.name}", patience.connect_seconds, time.monotonic()
    client = paramiko.SSHClient()
    client.set_log_channel(LOG_CHANNEL)
    client.set_missing_host_key_policy(_Reject())
    try:
        try:
            key = paramiko.Ed25519Key.from_private_key_file(str(identity.key_file))
            client.load_system_host_keys(str(identity.known_hosts))
        except (OSError, paramiko.SSHException) as error:
            cause = getattr(error, "strerror", None) or str(error)
            reason = f"its key or known hosts cannot be read: {cause}"
            raise HostError("this host", reason, "run `migctl setup`") from error
        client.connect(
            # Host keys are looked up by the peer's name in the cluster, whatever its address.
            peer.name,
            username=identity.user,
            pkey=key,
            sock=sock,
            allow_agent=False,
            look_for_keys=False,
            timeout=seconds,
            banner_timeout=seconds,
            auth_timeout=seconds,
        )
        transport = client.get_transport()
        if transport is None:
            raise PeerUnreachable(what, "the connection ended at once")
        channel = transport.open_session(timeout=seconds)
        channel.settimeout(seconds)
        channel.exec_command("control")
        hello = _greet(channel, peer.name, own)
        channel.settimeout(None)
        return Line(client, channel, hello)
    except BaseException as error:
        client.close()
        sock.close()
        if isinstance(error, (OSError, EOFError, paramiko.SSHException, FrameError)):
            late = time.monotonic() - begun >= 0.9 * seconds
            raise _explain(error, peer.name, seconds if late else None) from error
        raise


def _greet(channel: paramiko.Channel, peer: str, own: Hello) -> Hello:
    try:
        send_frame(channel, encode_word(own))
        payload = recv_frame(channel, HELLO_LIMIT_BYTES)
    except TimeoutError:
        raise
    except (OSError, EOFError):  # paramiko raises both.
        payload = None
    if payload is None:
        status = channel.recv_exit_status() if channel.status_event.wait(2) else None
        text = channel.recv_stderr(_STDERR_LIMIT_BYTES) if channel.recv_stderr_ready() else b""
        raise explain_ssh(peer, status, text.decode(errors="replace"))
    return check_answer(payload, peer)


def _explain(error: BaseException, peer: str, waited_seconds: float | None) -> PeerUnreachable:
    """One sentence; `waited_seconds` is how long, if that was too long (paramiko does not say)."""
    what, join = f"host {peer}", f"run `migctl join {peer}`"
    if isinstance(error, paramiko.BadHostKeyException):
        return PeerUnreachable(what, "it shows another host key than before", join)
    if isinstance(error, _UnknownHostKey):
        return PeerUnreachable(what, "its host key is not known", join)
    if waited_seconds is not None:
        reason = f"no answer within {waited_seconds:g} s"
        return PeerUnreachable(what, reason, "is it up, and its migd?")
    if isinstance(error, paramiko.AuthenticationException) and "EOF" not in str(error):
        return PeerUnreachable(what, "it does not accept this host's key", join)
    if isinstance(error, FrameError):
        return PeerUnreachable(what, f"its greeting makes no sense ({error.reason})")
    return turned_away(peer)
