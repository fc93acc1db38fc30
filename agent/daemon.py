"""How migd runs: its command line (Sprite's), where it logs, and whether it leaves the terminal."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from logging.handlers import WatchedFileHandler
from pathlib import Path

from migrate import paths

CENTRAL_LOG = "migrate.central"
"""The logger of the central daemon."""
EVICTION_LOG = "migrate.eviction"
"""The logger of evictions: one message for each guest that is sent away."""
OPEN_FILES = 65536
"""A central daemon has three descriptors for each host, and one for each client."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    silent: bool = False
    debug_level: int = 1
    log_to_files: bool = False
    foreground: bool = False


def parse_options(words: Sequence[str]) -> Options:
    """Exits with a usage message if they make no sense."""
    parser = argparse.ArgumentParser(prog="migd", description="The daemon on every host.")
    parser.add_argument("-s", action="store_true", help="say nothing about evictions")
    parser.add_argument(
        "-D",
        type=int,
        default=1,
        metavar="LEVEL",
        help="0: only what went wrong; 1: what happens (default); 2 and more: for debugging",
    )
    parser.add_argument("-L", action="store_true", help=f"log to files in {paths.LOG_DIR}")
    parser.add_argument(
        "-F", action="store_true", help="do not fork (a service manager's migd never does)"
    )
    given = parser.parse_args(list(words))
    return Options(given.s, given.D, given.L, given.F)


def set_up_logging(options: Options, host: str, directory: Path = paths.LOG_DIR) -> None:
    """To stderr, or one file for this host and one for the central daemon.

    :raises OSError: the files cannot be written.
    """
    level = {0: logging.WARNING, 1: logging.INFO}.get(max(0, options.debug_level), logging.DEBUG)
    if options.log_to_files:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        form = logging.Formatter("%(asctime)s %(message)s")
        handlers: list[logging.Handler] = []
        for name in (host, "central"):
            # Watched: so that logrotate may move it.
            handler = WatchedFileHandler(directory / f"{name}.log")
            handler.setFormatter(form)
            handlers.append(handler)
        logging.basicConfig(level=level, handlers=handlers[:1], force=True)
        central = logging.getLogger(CENTRAL_LOG)
        central.handlers = handlers[1:]
        central.propagate = False
    else:
        logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("paramiko").setLevel(logging.WARNING)
    if options.silent:
        logging.getLogger(EVICTION_LOG).setLevel(logging.CRITICAL)


def raise_open_files() -> None:
    """As many open files as the system allows, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Detached:
    """The background, as daemon(7) wants it: the caller's process ends when the daemon is ready."""

    def __init__(self) -> None:
        """Returns in the daemon. The caller's process waits, and exits 0 once it is ready, else 1."""
        self._reader, self._writer = os.pipe()
        if os.fork():
            os.close(self._writer)
            ready = os.read(self._reader, 1)
            os._exit(0 if ready else 1)
        os.close(self._reader)
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1):  # stderr stays, for what is logged there
            os.dup2(null, fd)
        os.close(null)

    def ready(self) -> None:
        """Let the caller's process end."""
        os.write(self._writer, b"1")
        os.close(self._writer)
