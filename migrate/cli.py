"""The command `migrate`."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from migrate import client, messages
from migrate.command import Words, run
from migrate.errors import MigrateError
from migrate.pids import format_pid, parse_pid

OWN_FAILURE = 125
HOST_ID_MAX = 65535
"""as migrate.config.HostId"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class _Reporter:
    """What a user sees of one migration."""

    def __init__(self, pid: int, verbose: bool, debug: bool) -> None:
        self._pid = pid
        self._verbose = verbose
        self._debug = debug
        self._line = sys.stderr.isatty() and sys.stdout.isatty()
        self._shown = False

    def progress(self, progress: messages.Progress) -> None:
        if self._debug:
            print(
                f"{format_pid(self._pid)}: {progress.step} ({progress.sent_bytes} bytes, "
                f"{progress.at_ms:.1f} ms after the freeze)",
                file=sys.stderr,
            )
        elif self._line and progress.sent_bytes:
            text = f"\r{format_pid(self._pid)}: {progress.sent_bytes / (1 << 20):.0f} MiB"
            print(text, end="\033[K", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def moved(self, moved: messages.Moved) -> None:
        if sys.stdout.isatty() or self._verbose:
            mebibytes = moved.sent_bytes / (1 << 20)
            print(
                f"{format_pid(moved.pid)} → {moved.host}  "
                f"(frozen {moved.frozen_ms:.0f} ms, {mebibytes:.0f} MiB)"
            )
        if self._verbose:
            for note in moved.notes:
                print(f"migrate: {note}", file=sys.stderr)


def _move(pid: int, request: messages.Move, verbose: bool, debug: bool) -> bool:
    reporter = _Reporter(pid, verbose, debug)
    for reply in client.ask(request):
        match reply:
            case messages.Progress():
                reporter.progress(reply)
            case messages.Moved():
                reporter.clear()
                reporter.moved(reply)
            case messages.Checked():
                print(f"{format_pid(pid)} can move")
                for note in reply.notes:
                    print(f"migrate: {note}", file=sys.stderr)
            case messages.Refused():
                reporter.clear()
                for obstacle in reply.obstacles:
                    error = MigrateError(obstacle.what, obstacle.reason, obstacle.remedy)
                    print(f"migrate: {error}", file=sys.stderr)
                return False
    return True


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
            help="Process to move: 0x1a2b is hex, 6699 decimal. May be repeated.",
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
    processes = [parse_pid(word) for word in pids]
    good = True
    for process in processes:
        request = messages.Move(process, host or "", number, check)
        good = _move(process, request, verbose, debug) and good
    if not good:
        raise typer.Exit(OWN_FAILURE)


def main() -> None:
    """Entry point: own failures end with 125 and one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every locale has an arrow
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
