"""What a host needs to call another: its key, the keys it trusts, and how long it waits."""

from dataclasses import dataclass
from pathlib import Path

from migrate import paths


@dataclass(frozen=True)
class Identity:
    """This host's key, and the file of host keys it trusts (nothing else is ever trusted)."""

    key_file: Path = paths.SSH_KEY
    known_hosts: Path = paths.KNOWN_HOSTS
    user: str = paths.PEER_USER


@dataclass(frozen=True)
class Patience:
    """Time limits, in seconds."""

    connect_seconds: float = 10.0
    """Until the peer's migd has answered our greeting."""
    ping_after_seconds: float = 3.0
    """A control connection silent for so long is asked for a sign of life."""
    answer_seconds: float = 5.0
    """The peer is dead to us if it gives none within."""
    retry_after_seconds: float = 1.0
    """Between a failed attempt and the next."""
    spare_seconds: float = 600.0
    """A spare raw connection that nobody takes is closed then."""


DEFAULT_IDENTITY = Identity()
DEFAULT_PATIENCE = Patience()
