"""`migctl`: what an administrator does with a host and its place in the cluster."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from migrate.errors import MigrateError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate import messages

EXIT_FAILURE = 125

app = typer.Typer(
    name="migctl",
    help="Set up hosts for process migration and look after them.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Set up hosts for process migration and look after them."""


@app.command()
def setup(
    name: Annotated[str | None, typer.Option(help="This host's name (default: its own).")] = None,
    host_id: Annotated[int | None, typer.Option("--id", help="Its number in the cluster.")] = None,
    address: Annotated[str | None, typer.Option(help="Where other hosts reach it.")] = None,
    port: Annotated[int | None, typer.Option(help="Its sshd's port (default: 22).")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Undo all of it.")] = False,
) -> None:
    """Make what migd needs on this host: user, keys, configuration, service."""
    from migrate.place import Place
    from migrate.setup import Wishes, set_up
    from migrate.setup import remove as take_away

    _require_root("setup")
    if remove:
        take_away(Place())
        return
    host = set_up(Place(), Wishes(name, host_id, address, port))
    _say(f"host {host.name} (id {host.id}) at {host.address} is set up")


@app.command()
def join(
    host: Annotated[str, typer.Argument(help="The other host, as you reach it with ssh.")],
    address: Annotated[
        str | None, typer.Option(help="Where this host reaches it (default: as it says).")
    ] = None,
    host_id: Annotated[int | None, typer.Option("--id", help="Its number in the cluster.")] = None,
    ssh_user: Annotated[str, typer.Option(help="Whom you log in as; must be root there.")] = "root",
    port: Annotated[int | None, typer.Option(help="Its sshd's port.")] = None,
    migctl: Annotated[Path | None, typer.Option(help="Where migctl is there.")] = None,
) -> None:
    """Let this host and another trust each other: exchange keys over your own ssh access."""
    from migrate.join import REMOTE_MIGCTL, Target
    from migrate.join import join as join_with
    from migrate.place import Place

    _require_root("join")
    target = Target(host, ssh_user, port, address, host_id, migctl or REMOTE_MIGCTL)
    joined = join_with(Place(), target)
    _say(f"joined {joined.name} (id {joined.id}) at {joined.address}")


@app.command("ps")
def list_processes() -> None:
    """List processes that are away from here, and guests that run here."""
    from migrate import messages
    from migrate.listing import table

    for reply in _ask(messages.ListGuests()):
        if isinstance(reply, messages.Guests):
            for line in table(reply.rows, sys.stdout.isatty()):
                _say(line)


@app.command()
def recover(
    lost: Annotated[
        str,
        typer.Option(metavar="HOST", help="My word that HOST is lost for good, with all it ran."),
    ] = "",
) -> None:
    """Settle migrations in doubt, whose destination has not confirmed."""
    from migrate import messages

    _require_root("recover")
    for reply in _ask(messages.Recover(lost)):
        if isinstance(reply, messages.Recovered):
            for line in reply.lines or ("nothing is in doubt",):
                _say(line)


@app.command("set")
def set_limits(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE…",
            help="idle_seconds=30 load_accept=.75,1,1.5 load_stop=2.5,2.75,3 guest_slots=2",
        ),
    ],
) -> None:
    """Change when this host takes guests, until its migd ends."""
    from migrate import mig
    from migrate.limits import parse_limits

    _require_root("set")
    mig.default().command(parse_limits(settings))


@app.command()
def block(
    reason: Annotated[str, typer.Option(help="Shown to those who ask why.")] = "",
) -> None:
    """Let this host take no more guests, until `migctl bring`."""
    from migrate import mig
    from migrate.mig_messages import Block

    mig.default().command(Block(reason))


@app.command()
def expel(
    reason: Annotated[str, typer.Option(help="Shown to those who ask why.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Return when they are gone.")] = False,
) -> None:
    """Let this host take no more guests, and send those that are here home."""
    from migrate import mig
    from migrate.loadavg import evicted
    from migrate.mig_messages import AwaitGone, Expel

    _say(evicted(mig.default().command(Expel(reason))))
    while wait and mig.default().command(AwaitGone()):
        pass


@app.command()
def bring() -> None:
    """Let this host take guests again."""
    from migrate import mig
    from migrate.mig_messages import Bring

    mig.default().command(Bring())


pam_app = typer.Typer(
    help="Whether logins at this host send its guests home.", rich_markup_mode=None
)
app.add_typer(pam_app, name="pam")


@pam_app.command("enable")
def pam_enable() -> None:
    """Have logins send guests home at once."""
    from migrate import pam
    from migrate.place import Place

    _require_root("pam enable")
    pam.enable(Place())


@pam_app.command("disable")
def pam_disable() -> None:
    """Undo `migctl pam enable`."""
    from migrate import pam
    from migrate.place import Place

    _require_root("pam disable")
    pam.disable(Place())


group_app = typer.Typer(help="Groups of processes (see joingroup).", rich_markup_mode=None)
app.add_typer(group_app, name="group")


@group_app.command("list")
def group_list() -> None:
    """Show the processes of all groups."""
    from migrate.group_asking import members
    from migrate.listing import group_table

    for line in group_table(members(0), sys.stdout.isatty()):
        _say(line)


@group_app.command("evict")
def group_evict(group: Annotated[str, typer.Argument(metavar="GROUP", help="Its number.")]) -> None:
    """Have the processes of a group come home, and send those that are guests here home."""
    from migrate.group_asking import parse_group
    from migrate.group_evict import evict

    failures = 0
    for failure in evict(parse_group(group), _say):
        failures += 1
        sys.stderr.write(f"migctl: {failure}\n")
    if failures:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def top(
    seconds: Annotated[float, typer.Option("-d", help="Between two looks.", min=0.2)] = 2.0,
    count: Annotated[int, typer.Option("-n", help="End after so many looks; 0: never.")] = 0,
) -> None:
    """Show all hosts and their guests, again and again."""
    from migrate.top import show

    show(seconds, count)


@app.command("log")
def show_log(
    count: Annotated[int, typer.Option("-n", help="How many, the newest last.", min=1)] = 20,
    json: Annotated[bool, typer.Option("--json", help="JSON, one object a line.")] = False,
) -> None:
    """Show the last migrations from and to this host, with times and reasons."""
    from migrate import messages
    from migrate.history import as_json, line

    for reply in _ask(messages.AskHistory(min(count, 1000))):
        if isinstance(reply, messages.History):
            for row in reply.rows:
                _say(as_json(row) if json else line(row))


@app.command("accept-join", hidden=True)
def accept_join() -> None:
    """The other side of `join`: reads a request on stdin, answers on stdout."""
    from migrate.join import ANSWER_LIMIT_BYTES, accept
    from migrate.place import Place

    _require_root("accept-join")
    question = sys.stdin.buffer.read(ANSWER_LIMIT_BYTES + 1)
    sys.stdout.buffer.write(accept(Place(), question) + b"\n")


def main() -> None:
    """The console script: own failures are one line on stderr and exit status 125."""
    try:
        arguments = sys.argv[1:] or ["--help"]
        status = app(arguments, prog_name="migctl", standalone_mode=False)
    except MigrateError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_FAILURE)
    except Exception as error:
        # A wrong command line: typer's errors have no public class of their own in all versions.
        if (explain := getattr(error, "format_message", None)) is not None:
            _fail(f"{explain().rstrip('.')}; see `migctl --help`")
        if os.environ.get("MIGRATE_TRACEBACK"):
            raise
        _fail(f"internal error: {type(error).__name__}: {error}")
    sys.exit(status if isinstance(status, int) else 0)


def _ask(request: "messages.Request") -> "Iterator[messages.Reply]":
    """Ask migd. Its refusal is raised."""
    from migrate import client, messages

    for reply in client.ask(request):
        if isinstance(reply, messages.Refused):
            first = reply.obstacles[0]
            raise MigrateError(first.what, first.reason, first.remedy)
        yield reply


def _fail(reason: str) -> None:
    sys.stderr.write(f"migctl: {reason}\n")
    sys.exit(EXIT_FAILURE)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise UserError(command, "only root may do this", f"sudo migctl {command}")


if __name__ == "__main__":
    main()
