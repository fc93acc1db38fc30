"""The commands `loadavg`, `rup` (all hosts) and `evict`: one program, as in Sprite."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from migrate.mig_messages import HostInfo

EXIT_FAILURE = 125

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def loadavg(
    everyone: Annotated[bool, typer.Option("-a", help="All hosts, as `rup`.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON, one array of hosts.")] = False,
    delete: Annotated[
        str | None, typer.Option("-Z", metavar="HOST", help="Delete a host that is down.")
    ] = None,
    send_away: Annotated[bool, typer.Option("-E", help="Send guests home, as `evict`.")] = False,
) -> None:
    """Load averages and idle times: of this host, or of all with -a."""
    from migrate import mig

    if delete is not None:
        mig.delete_host(delete)
    elif send_away:
        sys.stdout.write(f"{evicted(mig.evict())}\n")
    elif everyone:
        _show(mig.get_all_info(), json)
    else:
        _show([mig.get_info()], json)


def evicted(count: int) -> str:
    """Sprite's words."""
    return f"Evicted {count} foreign process{'' if count == 1 else 'es'}."


def _show(hosts: list[HostInfo], json: bool) -> None:
    from migrate import load_table

    if json:
        text = load_table.as_json(hosts)
    elif sys.stdout.isatty():
        text = load_table.for_people(hosts, colour="NO_COLOR" not in os.environ)
    else:
        text = load_table.plain(hosts)
    sys.stdout.write(text)


def main() -> None:
    """The console script, under any of its three names."""
    name = Path(sys.argv[0]).name
    first = {"rup": ["-a"], "evict": ["-E"]}.get(name, [])
    try:
        status = app([*first, *sys.argv[1:]], prog_name=name, standalone_mode=False)
    except MigrateError as error:
        _fail(name, str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_FAILURE)
    except Exception as error:
        if (explain := getattr(error, "format_message", None)) is None:
            raise
        _fail(name, f"{explain().rstrip('.')}; see `{name} --help`")
    sys.exit(status if isinstance(status, int) else 0)


def _fail(name: str, reason: str) -> None:
    sys.stderr.write(f"{name}: {reason}\n")
    sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    main()
