"""A configuration is either right as a whole, or the error names file, line, key and reason."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.config import Config, Host, is_address, is_host_name, load_config, parse_config
from migrate.errors import ConfigError, UserError

FILE = Path("/etc/migrate/config.toml")
HOSTS = """\
[[host]]
name = "node1"
id = 1
address = "10.0.0.1"

[[host]]
name = "node2"
id = 2
address = "fd00::2"
port = 2222
"""
RIGHT = 'name = "node1"\n' + HOSTS


def test_a_short_file_is_enough_and_the_rest_has_defaults() -> None:
    config = parse_config(RIGHT)
    assert config.hosts == (Host("node1", 1, "10.0.0.1", 22), Host("node2", 2, "fd00::2", 2222))
    assert config.this_host.name == "node1"
    assert [peer.name for peer in config.peers] == ["node2"]
    assert (config.freeze_limit_seconds, config.cut_freeze_seconds, config.lost_seconds) == (
        10,
        20,
        60,
    )
    assert config.accept_guests


def test_every_setting_can_be_set() -> None:
    config = parse_config(
        "freeze_limit_seconds = 2.5\ncut_freeze_seconds = 5\nlost_seconds = 15\n"
        "connect_seconds = 3\npeer_answer_seconds = 1\nghost_limit_bytes = 1048576\n"
        "min_free_memory_bytes = 0\naccept_guests = false\n"
        'shared_paths = ["/srv/nfs", "/home"]\n' + RIGHT
    )
    assert config.freeze_limit_seconds == 2.5
    assert config.lost_seconds == 15
    assert config.shared_paths == ("/srv/nfs", "/home")
    assert not config.accept_guests


def test_hosts_are_found_by_name_and_by_id() -> None:
    config = parse_config(RIGHT)
    assert config.host_named("node2") is config.host_with_id(2)
    with pytest.raises(
        UserError, match=r"host node7: not configured here; .*node1 \(1\), node2 \(2\)"
    ):
        config.host_named("node7")
    with pytest.raises(UserError, match="host id 7"):
        config.host_with_id(7)


def test_the_name_defaults_to_the_kernels_without_its_domain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Uname:
        nodename = "node2.example.org"

    monkeypatch.setattr(os, "uname", Uname)
    assert parse_config(HOSTS).name == "node2"
    assert parse_config(HOSTS.replace("node1", "node2.example.org")).name == "node2.example.org"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RIGHT.replace("id = 2", 'id = "2"'), ":9: id of [[host]] 2: Expected int, got str"),
        (RIGHT.replace("id = 2", "id = 0"), ":9: id of [[host]] 2: Expected int >= 1"),
        (RIGHT.replace("id = 2", "id = 65536"), ":9: id of [[host]] 2: Expected int <= 65535"),
        (RIGHT.replace("id = 2\n", ""), ":7: id of [[host]] 2: missing"),
        (
            RIGHT.replace("id = 2", "id = 1"),
            ":9: id of [[host]] 2: 1 is already that of host node1",
        ),
        (
            RIGHT.replace("node2", "node1"),
            ":8: name of [[host]] 2: node1 is already that of host node1",
        ),
        (
            RIGHT.replace('"fd00::2"\nport = 2222', '"10.0.0.1"'),
            ":10: address of [[host]] 2: 10.0.0.1 port 22 is already that of host node1",
        ),
        (RIGHT.replace("port", "prot"), ":11: prot of [[host]] 2: unknown key"),
        ("freeze_limit = 3\n" + RIGHT, ":1: freeze_limit: unknown key"),
        (RIGHT + "[bogus]\n", ": bogus: unknown key"),
        ("freeze_limit_seconds = nan\n" + RIGHT, ":1: freeze_limit_seconds: Expected float > 0.0"),
        ("freeze_limit_seconds = inf\n" + RIGHT, ":1: freeze_limit_seconds: Expected float <="),
        ("accept_guests = 1\n" + RIGHT, ":1: accept_guests: Expected bool, got int"),
        (
            "\nlost_seconds = 29\n" + RIGHT,
            ":2: lost_seconds: 29 is too short after cut_freeze_seconds",
        ),
        ("cut_freeze_seconds = 51\n" + RIGHT, ": lost_seconds: 60 is too short"),
        ('shared_paths = ["nfs"]\n' + RIGHT, ":1: shared_paths: 'nfs' must be an absolute path"),
        ('shared_paths = ["/a/../b"]\n' + RIGHT, ":1: shared_paths: '/a/../b'"),
        ('shared_paths = ["/"]\n' + RIGHT, ":1: shared_paths: '/' must"),
        (
            RIGHT.replace('"node1"', '"node9"', 1),
            ":1: name: no [[host]] has this host's name, node9",
        ),
        ('name = "node1"\n', ": host: missing"),
        ("host = 3\n", ":1: host: Expected array, got int"),
        ("", ": host: missing"),
        (RIGHT + "x = [", ": not valid TOML"),
        (RIGHT.replace("fd00::2", "-oProxyCommand=x"), ":10: address of [[host]] 2"),
        (RIGHT.replace('"node2"', '"node2 $(x)"'), ":8: name of [[host]] 2"),
        (RIGHT.replace('"node2"', '"node2\\n"'), ":8: name of [[host]] 2"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_key_and_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(text, FILE)
    assert str(error.value).startswith(f"{FILE}{message}")


@pytest.mark.parametrize("name", ["node1", "a", "web-1.example.org", "N_1", "x" * 64])
def test_a_host_may_be_called(name: str) -> None:
    assert is_host_name(name)


@pytest.mark.parametrize(
    "name", ["", "-x", ".x", "a b", "a\n", 'a"', "a'", "a;b", "$a", "a/b", "x" * 65, "ä", "a\0"]
)
def test_a_host_may_not_be_called(name: str) -> None:
    assert not is_host_name(name)


@pytest.mark.parametrize("address", ["10.0.0.1", "::1", "fe80::1%eth0", "host-1.example.org"])
def test_an_address_is_an_ip_or_a_name(address: str) -> None:
    assert is_address(address)


@pytest.mark.parametrize("address", ["", "-v", "a b", "root@host", "a\nb", "$(x)", "a/b", "[::1]"])
def test_an_address_is_nothing_else(address: str) -> None:
    assert not is_address(address)


@given(st.text())
def test_any_text_is_a_configuration_or_a_clear_error(text: str) -> None:
    try:
        assert isinstance(parse_config(text, FILE), Config)
    except ConfigError as error:
        assert str(error).startswith(str(FILE))


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_of_its_owner_alone_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", RIGHT)
    assert load_config(path, trusted_uid=os.getuid()).this_host.id == 1


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "config.toml", RIGHT, mode)
    with pytest.raises(ConfigError, match=f"others than its owner may write it; chmod go-w {path}"):
        load_config(path, trusted_uid=os.getuid())


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", RIGHT)
    with pytest.raises(ConfigError, match=f"belongs to uid {os.getuid()}, must belong to"):
        load_config(path, trusted_uid=os.getuid() + 1)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file; run `migctl setup`"):
        load_config(tmp_path / "config.toml")


def test_a_directory_or_binary_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(tmp_path, trusted_uid=os.getuid())
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(path, trusted_uid=os.getuid())
