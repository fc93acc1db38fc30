"""The words of `migctl set`."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from migrate.errors import UserError
from migrate.mig_messages import SetLimits


def parse_limits(words: Iterable[str]) -> SetLimits:
    """What "idle_seconds=30 load_stop=2.5,2.75,3" means.

    :raises UserError: nothing that can be set, or no such value.
    """
    known = SetLimits.__struct_fields__
    found: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise UserError(word, "sets nothing", f"use NAME=VALUE with one of {', '.join(known)}")
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            raise UserError(word, f"{value!r} is no number, or list of numbers") from None
        if not all(map(math.isfinite, numbers)):
            raise UserError(word, "must be finite")
        whole = [int(number) if number.is_integer() else number for number in numbers]
        found[name] = whole if len(whole) > 1 else whole[0]
    try:
        return msgspec.convert(found, SetLimits)
    except msgspec.ValidationError as error:
        raise UserError("set", str(error).replace("`", "")) from None
