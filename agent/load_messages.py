"""What migds say to the central daemon on their control connections, and its answers.

Members ask; the central daemon's own news (events for clients, orders to evict) are the answers to
Listen, which it holds back until there are some.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from agent.load_report import Report
from migrate.mig_messages import Event, Held, Reply, Request, Uid, Word

Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
LISTEN_SECONDS = 20.0
"""The central daemon answers a Listen within it, with or without news."""


class AskStanding(msgspec.Struct, frozen=True, tag="load-standing"):
    """To a candidate: do you lead? `term`: the highest that the asker has seen."""

    term: Number = 0


class StandingIs(msgspec.Struct, frozen=True, tag="load-standing-is"):
    """As agent.load_leader.Standing."""

    leads: bool
    term: Number


class ClientHolds(msgspec.Struct, frozen=True):
    """A client of the asker's host, and its claims."""

    number: Number
    uid: Uid
    held: Annotated[tuple[Held, ...], msgspec.Meta(max_length=4096)]


class AttachHost(msgspec.Struct, frozen=True, tag="load-attach"):
    """I follow you now: my report, my clients with what they hold."""

    report: Report
    clients: Annotated[tuple[ClientHolds, ...], msgspec.Meta(max_length=65536)] = ()


class Attached(msgspec.Struct, frozen=True, tag="load-attached"):
    """Which claims could not be had again."""

    term: Number
    lost: tuple[ClientHolds, ...] = ()


class SendReport(msgspec.Struct, frozen=True, tag="load-report"):
    """How I am now."""

    report: Report


class Noted(msgspec.Struct, frozen=True, tag="load-noted"):
    """To SendReport and ClientGone."""


class Listen(msgspec.Struct, frozen=True, tag="load-listen"):
    """Answer when there is something to tell."""


class ForClient(msgspec.Struct, frozen=True, tag="for-client"):
    """An event for a client of yours."""

    number: Number
    event: Event


class EvictHere(msgspec.Struct, frozen=True, tag="evict-here"):
    """This user's guests are to leave you."""

    uid: Uid
    reason: Word


class News(msgspec.Struct, frozen=True, tag="load-news"):
    """To Listen."""

    items: tuple[ForClient | EvictHere, ...] = ()


class ClientCall(msgspec.Struct, frozen=True, tag="load-call"):
    """A client of mine asks."""

    number: Number
    uid: Uid
    request: Request


class ClientAnswer(msgspec.Struct, frozen=True, tag="load-called"):
    """To ClientCall."""

    reply: Reply


class ClientGone(msgspec.Struct, frozen=True, tag="load-gone"):
    """A client of mine has gone."""

    number: Number


class NotCentral(msgspec.Struct, frozen=True, tag="load-not-me"):
    """To all of these: I do not lead, or do not know you; look for who does, or attach again."""


LoadQuestion = AskStanding | AttachHost | SendReport | Listen | ClientCall | ClientGone
LoadAnswer = StandingIs | Attached | Noted | News | ClientAnswer | NotCentral

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(LoadQuestion).decode
decode_answer = msgspec.msgpack.Decoder(LoadAnswer).decode
