"""migd's command line is Sprite's: -s, -D, -L, -F."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.daemon import CENTRAL_LOG, EVICTION_LOG, Detached, Options, parse_options, set_up_logging


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    names = (CENTRAL_LOG, EVICTION_LOG, "paramiko", "")
    loggers = [logging.getLogger(name or None) for name in names]
    before = [(log, log.level, log.handlers[:], log.propagate) for log in loggers]
    yield
    for log, level, handlers, propagate in before:
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.setLevel(level)
        log.handlers, log.propagate = handlers, propagate


def test_the_command_line() -> None:
    assert parse_options([]) == Options()
    assert parse_options(["-s", "-D", "3", "-L", "-F"]) == Options(True, 3, True, True)
    with pytest.raises(SystemExit):
        parse_options(["-D", "much"])


def log_everything() -> None:
    logging.getLogger("agent.x").debug("a detail")
    logging.getLogger("agent.x").info("a fact")
    logging.getLogger("agent.x").error("a failure")
    logging.getLogger(EVICTION_LOG).info("a guest was sent away")
    logging.getLogger(CENTRAL_LOG).warning("of the cluster")


@pytest.mark.parametrize(
    ("level", "said"), [(0, ["failure"]), (1, ["fact", "failure"]), (2, ["detail", "fact"])]
)
def test_with_files_the_host_and_the_central_daemon_have_one_each(
    tmp_path: Path, level: int, said: list[str]
) -> None:
    set_up_logging(Options(debug_level=level, log_to_files=True), "node7", tmp_path / "log")
    log_everything()
    own = (tmp_path / "log" / "node7.log").read_text()
    assert [word for word in said if f"a {word}" not in own] == []
    assert ("a fact" in own) == (level > 0) and ("a detail" in own) == (level > 1)
    assert "of the cluster" not in own
    assert "of the cluster" in (tmp_path / "log" / "central.log").read_text()


@pytest.mark.parametrize("silent", [False, True])
def test_silent_means_silent_about_evictions_only(tmp_path: Path, silent: bool) -> None:
    set_up_logging(Options(silent=silent, log_to_files=True), "node7", tmp_path)
    log_everything()
    own = (tmp_path / "node7.log").read_text()
    assert ("sent away" in own) is not silent
    assert "a fact" in own


@pytest.mark.parametrize("succeeds", [True, False])
def test_in_the_background_the_caller_learns_whether_it_became_ready(
    tmp_path: Path, succeeds: bool
) -> None:
    told = tmp_path / "told"
    child = os.fork()
    if child == 0:
        detached = Detached()
        # The daemon: in a session of its own, and no leader of it.
        told.write_text(f"{os.getsid(0) != os.getpid()} {Path.cwd()}")
        if succeeds:
            detached.ready()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if succeeds else 1)
    assert told.read_text() == "True /"
