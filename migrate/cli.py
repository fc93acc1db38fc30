"""The command `migrate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from migrate.command import Words, run
from migrate.errors import MigrateError
from migrate.group_asking import parse_group
from migrate.move import Moves, move
from migrate.pids import parse_pid

OWN_FAILURE = 125
HOST_ID_MAX = 65535
"""as migrate.config.HostId"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _parse_host_id(word: str) -> int:
    """:raises MigrateError: it is no host id."""
    if word.isascii() and word.isdecimal() and 1 <= int(word[:6]) <= HOST_ID_MAX and len(word) <= 5:
        return int(word)
    raise MigrateError(f"host id {word}", f"host ids are 1 to {HOST_ID_MAX}", "use -h for a name")


@app.command(context_settings={"allow_interspersed_args": False})
def migrate(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[COMMAND [ARGUMENT]...]", help="What to run; none: a shell."),
    ] = None,
    pids: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            metavar="PID",
            help="Process to move: 0x1a2b is hex, 6699 decimal; or @GROUP. May be repeated.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("-h", metavar="HOST", help="Where to, by name.")
    ] = None,
    host_id: Annotated[
        str | None, typer.Option("-H", metavar="ID", help="Where to, by number.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", help="Say what was done, also when piped.")
    ] = False,
    debug: Annotated[bool, typer.Option("-D", help="Show each step, with its time.")] = False,
    background: Annotated[
        bool, typer.Option("-b", help="Run it in the background: print its pid and return.")
    ] = False,
    low: Annotated[bool, typer.Option("-B", help="Run it at background (low) priority.")] = False,
    local: Annotated[
        bool, typer.Option("-l", help="Run it here if it cannot be run elsewhere.")
    ] = False,
    file: Annotated[
        str | None,
        typer.Option("-E", metavar="FILE", help="Execute FILE; COMMAND is only its argv[0]."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only tell what is in the way.")] = False,
) -> None:
    """Run a command on another host as if it ran here, or move running processes there.

    It is the idlest host of the cluster, or the one that -h or -H names.
    """
    if host is not None and host_id is not None:
        raise MigrateError("migrate", "-h and -H exclude each other", "use one of them")
    # Neither must be taken for «any host», which is what migd is told by leaving them out.
    if host == "":
        raise MigrateError("-h", "names no host", "leave it out to have one chosen")
    number = _parse_host_id(host_id) if host_id is not None else 0
    if file == "":
        raise MigrateError("-E", "names no file", "name the program to execute")
    if not pids:
        if check:
            raise MigrateError("--check", "no process named", "use -p PID")
        if file is not None and not command:
            raise MigrateError("-E", "needs the command's argv[0]", "write it after the options")
        run(
            Words(
                arguments=command or (),
                host=host or "",
                host_id=number,
                file=file or "",
                background=background,
                low=low,
                local=local,
                verbose=verbose,
                debug=debug,
            )
        )
    if command or background or low or local or file:
        raise MigrateError("-p", "moves processes, and runs no command", "use one of them")
    groups = [parse_group(word[1:]) for word in pids if word.startswith("@")]
    plain = [parse_pid(word) for word in pids if not word.startswith("@")]
    good = not plain or move(Moves(plain, host or "", number, check, verbose, debug))
    tell = verbose or sys.stdout.isatty()
    for group in groups:
        from migrate.group_move import move_for_migrate

        for failure in move_for_migrate(group, host or "", number, check=check, tell=tell):
            print(f"migrate: {failure}", file=sys.stderr)
            good = False
    if not good:
        raise typer.Exit(OWN_FAILURE)


def main() -> None:
    """Entry point: own failures end with 125 and one line on stderr."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except MigrateError as error:
        print(f"migrate: {error}", file=sys.stderr)
        sys.exit(OWN_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        print(f"migrate: {show().rstrip('.')}; see `migrate --help`", file=sys.stderr)
        sys.exit(OWN_FAILURE)


if __name__ == "__main__":
    main()
