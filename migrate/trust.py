"""Keys of other hosts: what may stand in authorized_keys and known_hosts, and how it gets there.

What a peer sends is never copied: a key is decoded, checked and written anew, so that no answer can
smuggle in an option, a second line or another host's name.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from pathlib import Path

from migrate.config import is_host_name
from migrate.errors import ConfigError, HostError

KEY_TYPE = "ssh-ed25519"
_BLOB_START = len(KEY_TYPE).to_bytes(4, "big") + KEY_TYPE.encode() + (32).to_bytes(4, "big")
_BLOB_BYTES = len(_BLOB_START) + 32

_SAFE_PATH = re.compile(r"/[A-Za-z0-9/._+-]+", re.ASCII)


@dataclass(frozen=True)
class PublicKey:
    """An ed25519 public key."""

    blob: bytes

    def __str__(self) -> str:
        return f"{KEY_TYPE} {base64.b64encode(self.blob).decode()}"


@dataclass(frozen=True)
class Bridge:
    """The forced command's program: the interpreter and the script, as sshd's user sees them."""

    python: Path
    script: Path

    def command(self, peer: str) -> str:
        """:raises HostError: a path would need quoting, which nobody should have to trust."""
        for path in (self.python, self.script):
            if not _SAFE_PATH.fullmatch(str(path)):
                raise HostError(
                    str(path),
                    "has characters that authorized_keys cannot hold safely",
                    "install migrate under a plain path, as /opt/migrate",
                )
        return f"{self.python} -I -S {self.script} {_checked(peer)}"


def parse_public_key(text: str, whose: str) -> PublicKey:
    """The key out of one line (type, base64, and whatever comment).

    :raises ConfigError: it is no ed25519 public key; names `whose` it should be.
    """
    words = text.split()
    what = f"public key of {whose}"
    if not words or words[0] != KEY_TYPE:
        raise ConfigError(what, f"not of type {KEY_TYPE}")
    try:
        blob = base64.b64decode(words[1] if len(words) > 1 else "", validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(what, "not base64") from None
    if len(blob) != _BLOB_BYTES or not blob.startswith(_BLOB_START):
        raise ConfigError(what, "not an ed25519 key")
    return PublicKey(blob)


def authorize(text: str, peer: str, key: PublicKey, bridge: Bridge) -> str:
    """authorized_keys with this peer's line, in place of any it had.

    :raises ConfigError: the key is already another peer's.
    """
    line = f'restrict,command="{bridge.command(peer)}" {key} migrate@{peer}'
    kept = [old for old in _lines(text) if old.split()[-1] != f"migrate@{peer}"]
    for old in kept:
        if str(key) in old:
            raise _shared(peer, old.split()[-1].partition("@")[2], "/etc/migrate/ssh")
    return _text([*kept, line])


def know(text: str, peer: str, key: PublicKey) -> str:
    """known_hosts with this peer's host key, by its name in the cluster, in place of any before.

    :raises ConfigError: the key is already another peer's.
    """
    _checked(peer)
    kept = [old for old in _lines(text) if old.split()[0] != peer]
    for old in kept:
        if str(key) in old:
            raise _shared(peer, old.split()[0], "/etc/ssh/ssh_host_*")
    return _text([*kept, f"{peer} {key}"])


def _shared(peer: str, other: str, where: str) -> ConfigError:
    return ConfigError(
        f"host {peer}",
        f"has the same key as host {other}: one is a copy of the other's disk, or was renamed",
        f"make new keys there ({where}), or remove the old host's line",
    )


def _checked(peer: str) -> str:
    if not is_host_name(peer):
        raise ConfigError(f"host {peer!r}", "not a host's name")
    return peer


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
