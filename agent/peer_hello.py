"""The first words between two migds, in either direction the same on every connection.

The caller says who it is and what the connection is for, the other answers with its own Hello or a
Refusal. Both stay decodable for ever (fields are only added): so that two versions can at least
tell each other that they differ.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.peer_errors import PeerUnreachable, one_line
from migrate.errors import PeerError
from migrate.framing import MALFORMED

PROTOCOL = 2
"""Raised whenever the meaning of any message between hosts changes."""

HELLO_LIMIT_BYTES = 4096
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Short = Annotated[str, msgspec.Meta(max_length=256)]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Who speaks. `boot_id` changes whenever its host boots."""

    protocol: int
    host: Short
    boot_id: Short
    use: Literal["control", "raw"] = "control"


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Why there will be no connection."""

    reason: str
    remedy: str = ""


class Purpose(msgspec.Struct, frozen=True, tag="purpose"):
    """The first frame of a raw connection in use: what its bytes are, and whose (`token`)."""

    purpose: Short
    token: Short = ""


Word = Hello | Refusal | Purpose
_decoder: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


def own_hello(host: str, boot_id_file: Path = BOOT_ID) -> Hello:
    """This host's Hello."""
    return Hello(PROTOCOL, host, boot_id_file.read_text().strip())


def encode_word(word: Word) -> bytes:
    """The payload of the frame that carries it."""
    return msgspec.msgpack.encode(word)


def decode_word(payload: bytes) -> Word:
    """:raises msgspec.MsgspecError: it is none."""
    return _decoder.decode(payload)


def check_answer(payload: bytes, peer: str) -> Hello:
    """The peer's Hello out of its answer to ours.

    :raises PeerUnreachable: it refuses, is another host, or speaks another protocol.
    """
    word = _understand(payload, peer)
    if isinstance(word, Refusal):
        raise PeerUnreachable(f"host {peer}", one_line(word.reason), one_line(word.remedy))
    if not isinstance(word, Hello):
        raise PeerUnreachable(f"host {peer}", "it answers with something else than a greeting")
    if word.protocol != PROTOCOL:
        raise PeerUnreachable(f"host {peer}", *_versions(word.protocol))
    if word.host != peer:
        raise PeerUnreachable(
            f"host {peer}",
            f"the host at its address calls itself {one_line(word.host)}",
            f"correct the address or the name, or run `migctl join {peer}` again",
        )
    return word


def check_caller(payload: bytes, known_as: str, here: str) -> Hello:
    """The Hello of a peer that came in, whose key is that of host `known_as`.

    :param here: this host's name.
    :raises PeerError: it gets its text as the Refusal, to be read there.
    """
    word = _understand(payload, known_as)
    if not isinstance(word, Hello):
        raise PeerError(f"host {known_as}", "it begins with something else than a greeting")
    if word.protocol != PROTOCOL:
        older = known_as if word.protocol < PROTOCOL else here
        reason = f"{here} speaks protocol {PROTOCOL}, {known_as} protocol {word.protocol}"
        raise PeerError(f"host {known_as}", reason, f"upgrade migrate on {older}")
    if word.host != known_as:
        raise PeerError(
            f"host {known_as}",
            f"the host with its key calls itself {one_line(word.host)}",
            "run `migctl join` again between the two",
        )
    return word


def _understand(payload: bytes, peer: str) -> Word:
    try:
        return decode_word(payload)
    except MALFORMED as error:
        reason = f"its greeting makes no sense ({one_line(str(error))})"
        raise PeerUnreachable(f"host {peer}", reason) from None


def _versions(theirs: int) -> tuple[str, str]:
    older = "there" if theirs < PROTOCOL else "here"
    return f"it speaks protocol {theirs}, this host {PROTOCOL}", f"upgrade migrate {older}"
