"""What migds ask each other on their control connections."""

from __future__ import annotations

from typing import Annotated

import msgspec

from agent.link import Name, Offer


class MakeOffer(msgspec.Struct, frozen=True, tag="offer"):
    """Will you take this guest? Accepted, or an error with the reason."""

    offer: Offer


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """Connect bulk and lifeline; my keeper waits."""

    boot_id: Name


class AskOutcome(msgspec.Struct, frozen=True, tag="outcome"):
    """What have you recorded of this transaction (of which you were the destination)?"""

    transaction: Name


class OutcomeIs(msgspec.Struct, frozen=True, tag="outcome-is"):
    """RESUMED, ENDED, ABORTED; OFFERED: not decided yet; empty: never heard of. And my boot id."""

    state: Name
    boot_id: Name


class MoveGuest(msgspec.Struct, frozen=True, tag="move-guest"):
    """Home's migd → the host where a guest runs: move it on."""

    guest: Name
    destination: Name
    chosen: bool = False
    """as in the offer"""


class ConnectGuest(msgspec.Struct, frozen=True, tag="connect-guest"):
    """The guest's host → home's migd: a keeper waits for it on `host`; connect the guard."""

    guest: Name
    host: Name


class Connected(msgspec.Struct, frozen=True, tag="connected"):
    """Done."""


class AskGuest(msgspec.Struct, frozen=True, tag="ask-guest"):
    """Home's migd: do you still have this guest?"""

    guest: Name


class AskHome(msgspec.Struct, frozen=True, tag="ask-home"):
    """The host of a guest → home's migd: does anybody stand for this guest there?"""

    guest: Name


class HomeIs(msgspec.Struct, frozen=True, tag="home-is"):
    """`boot_id` tells whether home has rebooted meanwhile."""

    wanted: bool
    boot_id: Name


class DropGuest(msgspec.Struct, frozen=True, tag="drop-guest"):
    """Home's migd: nobody stands for this guest at home any more: end it."""

    guest: Name


class GuestIs(msgspec.Struct, frozen=True, tag="guest-is"):
    """Whether its keeper runs here."""

    present: bool


class GuestMoved(msgspec.Struct, frozen=True, tag="guest-moved"):
    """It runs there now."""

    frozen_ms: float
    sent_bytes: int


class SetGroup(msgspec.Struct, frozen=True, tag="set-group"):
    """The host of a guest → its home's migd, or the other way round: this process is in that group now."""

    guest: Name
    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    """as the guest counts"""
    group: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class GroupSet(msgspec.Struct, frozen=True, tag="group-set"):
    """Done."""


Question = (
    MakeOffer | AskOutcome | MoveGuest | ConnectGuest | AskGuest | AskHome | DropGuest | SetGroup
)
Answer = Accepted | OutcomeIs | GuestMoved | Connected | GuestIs | HomeIs | GroupSet

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(Question).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
