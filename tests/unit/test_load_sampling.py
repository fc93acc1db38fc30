"""Load and idle time are found where a host has them; what it lacks is left out."""

import os
import pty
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.load_idle import IdleWatch
from agent.load_sampling import Sampler

NOW = 1_000_000.0
UP = 50_000.0


def watch(root: Path, logind: str = "") -> IdleWatch:
    return IdleWatch(root, ask=lambda session: logind, now=lambda: NOW)


@pytest.fixture
def terminal() -> Iterator[Path]:
    """A real terminal's device."""
    master, slave = pty.openpty()
    try:
        yield Path(os.ttyname(slave))
    finally:
        os.close(master)
        os.close(slave)


def place(root: Path, name: str, device: Path, ago: float) -> None:
    """Have a terminal stand at /dev/NAME whose last input was so many seconds ago."""
    os.utime(device, (NOW - ago, NOW))
    (root / "dev/pts").mkdir(parents=True, exist_ok=True)
    (root / "dev" / name).symlink_to(device)


def process(root: Path, pid: int, name: str, parent: int, device: int) -> None:
    (root / "proc" / str(pid)).mkdir(parents=True)
    stat = f"{pid} ({name}) S {parent} {pid} {pid} {device} -1 0 0"
    (root / "proc" / str(pid) / "stat").write_text(stat)


def session(root: Path, **facts: str) -> None:
    directory = root / "run/systemd/sessions"
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{key}={value}\n" for key, value in facts.items())
    (directory / "c1").write_text(text)


def test_without_any_source_a_host_is_idle_since_its_boot(tmp_path: Path) -> None:
    assert watch(tmp_path).idle_seconds(UP) == UP


def test_input_at_a_terminal_counts(tmp_path: Path, terminal: Path) -> None:
    place(tmp_path, "tty1", terminal, ago=42)
    assert watch(tmp_path).idle_seconds(UP) == 42


def test_input_from_before_the_boot_does_not(tmp_path: Path, terminal: Path) -> None:
    place(tmp_path, "tty1", terminal, ago=UP + 1)
    assert watch(tmp_path).idle_seconds(UP) == UP


def test_input_in_the_future_is_input_now(tmp_path: Path, terminal: Path) -> None:
    place(tmp_path, "tty1", terminal, ago=-86400)
    assert watch(tmp_path).idle_seconds(UP) == 0


def test_what_is_no_terminal_does_not_count(tmp_path: Path, terminal: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/tty1").write_text("")
    place(tmp_path, "null", terminal, ago=1)
    assert watch(tmp_path).idle_seconds(UP) == UP


@pytest.mark.parametrize(
    ("server", "idle"), [("sshd", UP), ("sshd-session", UP), ("xterm", 7), ("login", 7)]
)
def test_a_remote_login_does_not_count_and_a_terminal_emulator_does(
    tmp_path: Path, terminal: Path, server: str, idle: float
) -> None:
    place(tmp_path, "pts/0", terminal, ago=7)
    process(tmp_path, 10, server, 1, 0)
    process(tmp_path, 11, "a (shell)", 10, terminal.stat().st_rdev)
    assert watch(tmp_path).idle_seconds(UP) == idle


@pytest.mark.parametrize(
    ("told", "idle"),
    [
        ("IdleHint=no\nIdleSinceHint=0\n", 0),
        (f"IdleHint=yes\nIdleSinceHint={int((NOW - 90) * 1e6)}\n", 90),
        ("", UP),
    ],
)
def test_logind_tells_about_graphical_sessions(tmp_path: Path, told: str, idle: float) -> None:
    session(tmp_path, REMOTE="0", CLASS="user", TYPE="wayland")
    assert watch(tmp_path, told).idle_seconds(UP) == idle


@pytest.mark.parametrize(
    "facts",
    [
        {"REMOTE": "1", "CLASS": "user", "TYPE": "x11"},
        {"REMOTE": "0", "CLASS": "greeter", "TYPE": "x11"},
        {"REMOTE": "0", "CLASS": "user", "TYPE": "tty"},
    ],
)
def test_other_sessions_do_not_ask_logind(tmp_path: Path, facts: dict[str, str]) -> None:
    session(tmp_path, **facts)
    assert watch(tmp_path, "IdleHint=no\n").idle_seconds(UP) == UP


def test_a_sample_reads_the_files_of_proc(tmp_path: Path) -> None:
    (tmp_path / "loadavg").write_text("1.50 2.25 3.00 4/100 7\n")
    (tmp_path / "uptime").write_text("500.25 900.00\n")
    sample = Sampler(IdleWatch(tmp_path / "none"), tmp_path).sample()
    assert sample.loads == (1.5, 2.25, 3.0)
    assert sample.ready_queue == 3
    assert sample.up_seconds == sample.idle_seconds == 500.25
    assert 0 <= sample.cpu_percent <= 100
    assert sample.loads_each == tuple(load / sample.processors for load in sample.loads)


def test_the_ready_queue_is_a_weighted_average(tmp_path: Path) -> None:
    (tmp_path / "uptime").write_text("500.25 900.00\n")
    sampler = Sampler(IdleWatch(tmp_path / "none"), tmp_path)
    queues = []
    for running in (11, 1, 1):
        (tmp_path / "loadavg").write_text(f"0 0 0 {running}/100 7\n")
        queues.append(sampler.sample().ready_queue)
    assert queues[0] > queues[1] > queues[2] > 0


def test_this_host_can_be_sampled() -> None:
    sample = Sampler().sample()
    assert sample.processors == os.cpu_count()
    assert 0 <= sample.idle_seconds <= sample.up_seconds
