"""A strict reader of protobuf messages, for images that come from another host.

CRIU reads them with a parser of its own. So that it finds in them what was found here, everything that
two parsers might take differently is refused: unknown fields, a field twice, numbers too large for their
field. (See «Encoding» in protobuf's documentation.) And pycriu's parser, in Python, would cost a frozen
process some milliseconds for each image.
"""

from __future__ import annotations

from criu_hooks.image_format import ImageError

_VARINT, _FIXED64, _BYTES = 0, 1, 2
_MAX_VARINT_BYTES = 10
_WIRE_TYPES = {"": _VARINT, "l": _VARINT, "b": _BYTES, "f": _FIXED64}


class Fields:
    """What one message holds."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        """strings and messages"""
        self.lists: dict[str, list[int]] = {}
        self.blob_lists: dict[str, list[bytes]] = {}

    def number(self, name: str) -> int:
        """A number; 0 if it is not there."""
        return self.numbers.get(name, 0)

    def path(self, name: str) -> str:
        """A string; "" if it is not there. Raises ImageError: CRIU, in C, would see a shorter one."""
        text = self.blobs.get(name, b"")
        if b"\0" in text:
            raise ImageError(f"a {name} holds a zero byte")
        return text.decode(errors="surrogateescape")


class Kind:
    """A kind of message, with its fields.

    :param fields: words ``name=NUMBER``, each followed by ``l`` (64 bits), ``b`` (string, bytes or message),
        ``f`` (fixed64) or nothing (32 bits), and by ``*`` if it is repeated.
    """

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        self.fields = fields.split()
        self._by_key: dict[int, tuple[str, bool, bool]] = {}
        for word in self.fields:
            field, _, rest = word.partition("=")
            repeated = rest.endswith("*")
            digits = rest.rstrip("*lbf")
            letter = rest[len(digits) :].rstrip("*")
            key = int(digits) << 3 | _WIRE_TYPES[letter]
            self._by_key[key] = (field, repeated, letter == "")

    @property
    def field_names(self) -> dict[int, str]:
        """Every field by its number."""
        return {key >> 3: field for key, (field, _, _) in self._by_key.items()}

    def read(self, data: bytes) -> Fields:
        """:raises ImageError: it is not exactly such a message."""
        found = Fields()
        at, end = 0, len(data)
        try:
            while at < end:
                key, at = _varint(data, at)
                if key not in self._by_key:
                    raise ImageError(f"{self.name} has an unknown field ({key >> 3})")
                field, repeated, narrow = self._by_key[key]
                wire_type = key & 7
                if wire_type == _VARINT:
                    value, at = _varint(data, at)
                    if narrow and value >> 32:
                        raise ImageError(f"{self.name} has too large a {field}")
                    if repeated:
                        found.lists.setdefault(field, []).append(value)
                    elif field in found.numbers:
                        raise ImageError(f"{self.name} has {field} twice")
                    else:
                        found.numbers[field] = value
                    continue
                size = 8
                if wire_type == _BYTES:
                    size, at = _varint(data, at)
                if at + size > end:
                    raise ImageError(f"{self.name} is cut off")
                blob = data[at : at + size]
                at += size
                if repeated:
                    found.blob_lists.setdefault(field, []).append(blob)
                elif field in found.blobs:
                    raise ImageError(f"{self.name} has {field} twice")
                else:
                    found.blobs[field] = blob
        except IndexError:
            raise ImageError(f"{self.name} is cut off") from None
        return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and the offset after it."""
    value = data[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for more in range(1, _MAX_VARINT_BYTES):
        byte = data[at + more]
        value |= (byte & 0x7F) << 7 * more
        if byte < 0x80:
            return value, at + more + 1
    raise ImageError("a number has no end")


def encode_varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def replace(data: bytes, number: int, value: bytes | None) -> bytes:
    """Put another value in the place of a message's field, or nothing. A field that is not there is not added.

    :param data: a message that was read.
    :param value: as it is encoded, but without the length of a string or message.
    """
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        size, at = _size(data, at, key & 7)
        at += size
        if key >> 3 == number:
            return data[:start] + (b"" if value is None else _field(key, value)) + data[at:]
    return data


def _size(data: bytes, at: int, wire_type: int) -> tuple[int, int]:
    """Of a value, without its own length, and where it begins."""
    if wire_type == _VARINT:
        return _varint(data, at)[1] - at, at
    return _varint(data, at) if wire_type == _BYTES else (8, at)


def _field(key: int, value: bytes) -> bytes:
    length = encode_varint(len(value)) if key & 7 == _BYTES else b""
    return encode_varint(key) + length + value
