"""What `migrate` executes first: a command goes straight on its way, all else to `migrate.cli`.

Typer costs 70 ms; a command that runs elsewhere should not wait for them. So the few options of a
command are read here; whatever is not plainly one of them typer reads, and complains about.
"""

from __future__ import annotations

import sys

from migrate.command import Words, run
from migrate.errors import MigrateError

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_FAILURE = 125
_FLAGS = {"b": "background", "B": "low", "l": "local", "v": "verbose", "D": "debug"}
_VALUES = {"h": "host", "E": "file"}


def plain_command(words: Sequence[str]) -> Words | None:
    """What the words after `migrate` say, or None if typer must read them."""
    flags: dict[str, bool] = {}
    values: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in _FLAGS:
                flags[_FLAGS[letter]] = True
            elif letter in _VALUES and (letters or rest) and _VALUES[letter] not in values:
                values[_VALUES[letter]], letters = letters or rest.pop(0), ""
            else:
                return None
    if not rest or not all(values.values()):
        return None
    return Words(
        arguments=rest,
        host=values.get("host", ""),
        file=values.get("file", ""),
        background=flags.get("background", False),
        low=flags.get("low", False),
        local=flags.get("local", False),
        verbose=flags.get("verbose", False),
        debug=flags.get("debug", False),
    )


def main() -> None:
    """Entry point: own failures end with 125 and one line on stderr."""
    words = plain_command(sys.argv[1:])
    if words is None:
        from migrate import cli

        cli.main()
        return
    try:
        run(words)
    except MigrateError as error:
        print(f"migrate: {error}", file=sys.stderr)
        sys.exit(OWN_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
