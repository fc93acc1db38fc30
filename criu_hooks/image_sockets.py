"""Sockets in the images: only such as a user's program could make anew by itself."""

from __future__ import annotations

import os
import socket

from criu_hooks import image_kinds as kinds
from criu_hooks.image_format import ImageError
from criu_hooks.image_names import Wanted, making
from criu_hooks.images import Owner
from criu_hooks.protobuf_wire import Fields

_MAX_PRIORITY = 6
"""Above it, SO_PRIORITY takes a capability (socket(7))."""
_CLOSED = 7
"""TCP_CLOSE, also of other protocols (kernel: include/net/tcp_states.h)"""
_PROTOCOLS = (
    (socket.SOCK_STREAM, socket.IPPROTO_TCP),
    (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    (socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6),
)
_SPECIAL_BITS = 0o7000


def check_inet(sock: Fields) -> None:
    """It has no address: binding to it might take rights, and it would be this host's."""
    if sock.number("family") not in (socket.AF_INET, socket.AF_INET6):
        raise ImageError("a socket is of an unknown family")
    if (sock.number("type"), sock.number("proto")) not in _PROTOCOLS:
        raise ImageError("a socket is of a kind that takes rights")
    if sock.number("src_port") or sock.number("dst_port") or sock.number("state") != _CLOSED:
        raise ImageError("a socket has an address")
    _check_options(sock)


def check_unix(sock: Fields, owner: Owner) -> Wanted | None:
    """What its name in the file system takes; None if it has no such name."""
    if sock.number("uflags"):
        raise ImageError("a unix socket leads out of the tree")
    _check_options(sock)
    if "file_perms" in sock.blobs:
        perms = kinds.FILE_PERMISSIONS.read(sock.blobs["file_perms"])
        if perms.number("uid") != owner.uid or perms.number("gid") not in owner.gids:
            raise ImageError("a unix socket belongs to another user")
        if perms.number("mode") & _SPECIAL_BITS:
            raise ImageError("a unix socket has special permissions")
    name = sock.blobs.get("name", b"").rstrip(b"\0")
    if not name or name.startswith(b"\0"):
        return None
    if b"\0" in name:
        raise ImageError("the name of a unix socket holds a zero byte")
    path = os.fsdecode(name)
    directory = sock.path("name_dir")
    return making(f"{directory}/{path}" if directory and not path.startswith("/") else path)


def _check_options(sock: Fields) -> None:
    options = kinds.SOCKET_OPTIONS.read(sock.blobs.get("opts", b""))
    if (
        options.number("so_mark")
        or options.blobs.get("so_bound_dev")
        or options.number("so_priority") > _MAX_PRIORITY
    ):
        raise ImageError("a socket has options that take rights")
