"""What clients and migd say to each other on migd's socket.

One frame a message (migrate.framing), in msgpack.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from migrate import group_messages
from migrate.protocol import PROTOCOL as PROTOCOL

Word = Annotated[str, msgspec.Meta(max_length=256)]


class Move(msgspec.Struct, frozen=True, tag="move"):
    """Move a process of mine; or, with `check_only`, tell what is in the way."""

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    host: Word = ""
    host_id: int = 0
    check_only: bool = False
    protocol: int = PROTOCOL


class ListGuests(msgspec.Struct, frozen=True, tag="list"):
    """What is away from here or a guest here."""

    protocol: int = PROTOCOL


class Recover(msgspec.Struct, frozen=True, tag="recover"):
    """Settle transactions in doubt.

    `lost_host`: an administrator's word that this host will not come back.
    """

    lost_host: Word = ""
    protocol: int = PROTOCOL


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A step of a migration. `at_ms`: since the freeze; 0 before it."""

    step: str
    sent_bytes: int = 0
    at_ms: float = 0.0


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """It runs there now."""

    pid: int
    host: str
    frozen_ms: float
    sent_bytes: int
    notes: tuple[str, ...] = ()


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """Nothing is in the way."""

    pid: int
    notes: tuple[str, ...] = ()


class Obstacle(msgspec.Struct, frozen=True):
    """One reason why not."""

    what: str
    reason: str
    remedy: str = ""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Every reason why not; the process is unharmed."""

    obstacles: tuple[Obstacle, ...]


class GuestRow(msgspec.Struct, frozen=True):
    """One line of `migctl ps`."""

    pid: int
    user: str
    home: str
    where: str
    since: float
    """seconds since the epoch"""
    state: str
    """with the reason, if it is evicted"""
    command: str
    priority: int = 1
    """as migrate.mig_messages.Priority"""


class Guests(msgspec.Struct, frozen=True, tag="guests"):
    """The answer to ListGuests."""

    rows: tuple[GuestRow, ...]


class Recovered(msgspec.Struct, frozen=True, tag="recovered"):
    """The answer to Recover: one line for each transaction that was in doubt."""

    lines: tuple[str, ...]


class AskHistory(msgspec.Struct, frozen=True, tag="history"):
    """The last migrations from and to here."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    protocol: int = PROTOCOL


class HistoryRow(msgspec.Struct, frozen=True):
    """One migration, as it stands now."""

    since: float
    """seconds since the epoch, of its last step"""
    state: str
    """as agent.journal.State"""
    outgoing: bool
    peer: str
    pid: int
    user: str
    home: str
    reason: str
    command: str


class History(msgspec.Struct, frozen=True, tag="history-is"):
    """The answer to AskHistory, the newest last."""

    rows: tuple[HistoryRow, ...]


Request = Move | ListGuests | Recover | AskHistory | group_messages.Request
Reply = Progress | Moved | Checked | Refused | Guests | Recovered | History | group_messages.Reply
FINAL = (Moved, Checked, Refused, Guests, Recovered, History, *group_messages.FINAL)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
