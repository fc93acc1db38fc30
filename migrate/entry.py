"""What `migrate` executes first: commands and moves go straight on their way, all else to `migrate.cli`.

Typer costs 100 ms; neither a command that runs elsewhere nor a process that moves should wait for
them. So their few options are read here; whatever is not plainly one of them typer reads, and
complains about.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import sys

from migrate.command import Words, run
from migrate.errors import MigrateError

TYPE_CHECKING = False  # typing's own, without its import
if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.move import Moves

OWN_FAILURE = 125
_FLAGS = {"b": "background", "B": "low", "l": "local", "v": "verbose", "D": "debug"}
_VALUES = {"h": "host", "E": "file"}
_MOVE_FLAGS = ("-v", "-D")


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
    if not all(values.values()) or ("file" in values and not rest):
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


def plain_move(words: Sequence[str]) -> Moves | None:
    """What the words after `migrate` say about processes to move, or None if typer must read them."""
    from migrate.move import Moves
    from migrate.pids import parse_pid

    pids: list[int] = []
    hosts: list[str] = []
    flags: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in _MOVE_FLAGS:
            flags.add(word)
        elif word == "-p" and rest and not rest[0].startswith("@"):
            pids.append(parse_pid(rest.pop(0)))
        elif word == "-h" and rest and rest[0]:
            hosts.append(rest.pop(0))
        else:
            return None
    if not pids or len(hosts) > 1:
        return None
    return Moves(pids, "".join(hosts), verbose="-v" in flags, debug="-D" in flags)


def main() -> None:
    """Entry point: own failures end with 125 and one line on stderr."""
    try:
        _main(sys.argv[1:])
    except MigrateError as error:
        print(f"migrate: {error}", file=sys.stderr)
        sys.exit(OWN_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)


def _main(words: Sequence[str]) -> None:
    command = plain_command(words)
    if command is not None:
        if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # a shell wants to see how it ended
        run(command)
    moves = plain_move(words) if "-p" in words else None
    if moves is not None:
        from migrate.move import move

        sys.exit(0 if move(moves) else OWN_FAILURE)
    from migrate import cli

    cli.main()
