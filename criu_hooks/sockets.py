"""What the kernel knows of sockets: unix ones with their peers (sock_diag(7)), internet ones."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from criu_hooks.proc import ProcDir

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME_AND_PEER = 1 | 4
_UNIX_DIAG_NAME, _UNIX_DIAG_PEER = 0, 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_UNIX_MESSAGE = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")

TCP_ESTABLISHED = 1
TCP_LISTEN = 10
"""states of sockets, also of unix ones (kernel: include/net/tcp_states.h)"""


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """One unix socket."""

    inode: int
    type: int
    """SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET"""
    state: int
    name: str
    """path, or @name of an abstract address; "" if it has none"""
    peer: int
    """inode of the socket it is connected to; 0: to none"""

    @property
    def listening(self) -> bool:
        """Whether it waits for connections."""
        return self.state == TCP_LISTEN

    @property
    def reachable(self) -> bool:
        """Whether others can find it by its name; a connection's name is only its listener's."""
        connection = self.peer or self.state == TCP_ESTABLISHED
        return bool(self.name) and (self.type == socket.SOCK_DGRAM or not connection)


@dataclass(frozen=True, slots=True)
class UnixSockets:
    """All unix sockets of a network namespace."""

    _by_inode: Mapping[int, UnixSocket] = field(default_factory=dict)

    def get(self, inode: int) -> UnixSocket | None:
        """None: there is no such socket."""
        return self._by_inode.get(inode)


def unix_sockets() -> UnixSockets:
    """The unix sockets of our own network namespace.

    :raises OSError: the kernel has no sock_diag for unix sockets (CRIU needs it too).
    """
    message = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_NAME_AND_PEER, 0, 0)
    header = _HEADER.pack(
        _HEADER.size + len(message), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0
    )
    found: dict[int, UnixSocket] = {}
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as link:
        link.sendto(header + message, (0, 0))
        done = False
        while not done:
            done = _collect(link.recv(1 << 16), found)
    return UnixSockets(found)


def _collect(data: bytes, found: dict[int, UnixSocket]) -> bool:
    """Takes one datagram of the answer; true if it was the last."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if kind == _NLMSG_DONE:
            return True
        if kind == _NLMSG_ERROR:
            error = -struct.unpack_from("=i", data, at + _HEADER.size)[0]
            raise OSError(error, os.strerror(error), "sock_diag")
        unix = parse_unix_message(data[at + _HEADER.size : at + length])
        found[unix.inode] = unix
        at += (length + 3) & ~3
    return False


def parse_unix_message(data: bytes) -> UnixSocket:
    """One struct unix_diag_msg with its attributes."""
    _, kind_of_socket, state, _, inode, _, _ = _UNIX_MESSAGE.unpack_from(data)
    name, peer, at = "", 0, _UNIX_MESSAGE.size
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        value = data[at + _ATTRIBUTE.size : at + length]
        if kind == _UNIX_DIAG_NAME:
            abstract = value.startswith(b"\0")
            text = os.fsdecode(value[1:] if abstract else value.rstrip(b"\0"))
            name = "@" + text if abstract else text
        elif kind == _UNIX_DIAG_PEER:
            (peer,) = struct.unpack("=I", value)
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    return UnixSocket(inode, kind_of_socket, state, name, peer)


@dataclass(frozen=True, slots=True)
class InetSocket:
    """One internet socket that has an address."""

    inode: int
    protocol: str
    """tcp, tcp6, udp..., as the file in /proc/net is called"""
    local: str
    """address:port"""
    remote: str
    """address:port; port 0: not connected"""
    state: int

    @property
    def listening(self) -> bool:
        """Whether it is TCP and waits for connections."""
        return self.protocol.startswith("tcp") and self.state == TCP_LISTEN

    @property
    def connected(self) -> bool:
        """Whether it has a peer."""
        return not self.remote.endswith(":0")


@dataclass(frozen=True, slots=True)
class InetSockets:
    """The internet sockets of a network namespace that have an address."""

    _by_inode: Mapping[int, InetSocket] = field(default_factory=dict)

    def get(self, inode: int) -> InetSocket | None:
        """None: the socket is neither bound nor connected."""
        return self._by_inode.get(inode)


_INET_TABLES = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6")


def inet_sockets(pid: int) -> InetSockets:
    """The internet sockets in a process's network namespace.

    :raises OSError: the process is gone.
    """
    found: dict[int, InetSocket] = {}
    with ProcDir(pid) as proc:
        for name in _INET_TABLES:
            try:
                text = proc.read(f"net/{name}")
            except FileNotFoundError:
                continue
            found.update((s.inode, s) for s in parse_inet_table(name, text))
    return InetSockets(found)


def parse_inet_table(protocol: str, text: str) -> tuple[InetSocket, ...]:
    """One file of /proc/net, such as tcp6; sockets that nobody holds any more are left out."""
    sockets = []
    for line in text.splitlines()[1:]:
        parts = line.split()
        inode = int(parts[9])
        if inode:
            sockets.append(
                InetSocket(
                    inode,
                    protocol,
                    local=_address(parts[1]),
                    remote=_address(parts[2]),
                    state=int(parts[3], 16),
                )
            )
    return tuple(sockets)


def _address(text: str) -> str:
    """`0100007F:1F90` → `127.0.0.1:8080`; the address is in words of the host's byte order."""
    host, _, port = text.partition(":")
    raw = bytes.fromhex(host)
    if sys.byteorder == "little":
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    if len(raw) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{int(port, 16)}"
