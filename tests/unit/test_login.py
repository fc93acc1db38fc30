"""Which sessions that PAM opens mean that somebody wants this host for himself."""

import pytest

from agent.logins import Login
from migrate.config import Config, Host

HERE = Config(hosts=(Host("node1", 1, "10.0.0.1"),), name="node1")
REMOTE = Config(hosts=HERE.hosts, name="node1", remote_logins=True)


@pytest.mark.parametrize(
    ("line", "here", "remote"),
    [
        ("login\talice\t", True, True),
        ("gdm-password\talice\t", True, True),
        ("lightdm\talice\tlocalhost", True, True),
        ("login\talice\t10.0.0.9", False, True),  # login -h: a telnetd's
        ("sshd\talice\t10.0.0.9", False, True),
        ("sshd\tmigrate\t10.0.0.9", False, False),  # other hosts' migds
        ("login\tmigrate\t", False, False),
        *((f"{service}\talice\t", False, False) for service in ("su", "sudo", "cron", "runuser")),
    ],
)
def test_only_interactive_logins_count_and_remote_ones_if_it_is_set(
    line: str, here: bool, remote: bool
) -> None:
    login = Login.of(line)
    assert login is not None
    assert (login.counts(HERE), login.counts(REMOTE)) == (here, remote)


@pytest.mark.parametrize("line", ["", "\0\0\0", "login", "login\talice", "\talice\t", "a\tb\tc\td"])
def test_lines_that_make_no_sense_are_none(line: str) -> None:
    assert Login.of(line) is None


def test_what_a_remote_user_has_chosen_is_fit_for_a_log() -> None:
    login = Login.of("sshd\tali\x1b[2Jce\t" + "x" * 5000)
    assert login is not None
    assert login.user.isprintable()
    assert len(login.remote_host) <= 64
