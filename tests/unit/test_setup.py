"""Setting up a host and joining two, each in a directory that stands for its root."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from migrate import paths
from migrate.config import Config, Host, load_config, parse_config
from migrate.config_edit import first_text, with_host
from migrate.errors import ConfigError, HostError, MigrateError, PeerError, UserError
from migrate.files import write_file
from migrate.join import (
    JoinAnswer,
    JoinRefusal,
    JoinRequest,
    Target,
    accept,
    ask_program,
    join,
)
from migrate.join_ids import Standing, agree_on_ids
from migrate.place import Place, check_readable_by_all, run_program
from migrate.setup import Wishes, make_runtime_directories, remove, set_up
from migrate.trust import Bridge, PublicKey, authorize, know, parse_public_key

BRIDGE = Bridge(Path("/opt/migrate/bin/python"), Path("/opt/migrate/lib/agent/bridge.py"))


def key_of(number: int) -> str:
    return str(PublicKey(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes([number]) * 32))


@dataclass
class Machine:
    """A host below a directory. Programs that would change the real one are only noted."""

    root: Path
    name: str
    number: int
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.root / "etc/ssh").mkdir(parents=True)
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (self.root / "etc/group").write_text("root:x:0:\n")
        self.write(paths.HOST_PUBLIC_KEY, f"{key_of(self.number)} root@{self.name}\n")
        self.place = Place(self.root, self.run, os.getuid(), BRIDGE)

    def run(self, command: Sequence[str]) -> None:
        self.ran.append(" ".join(command))
        if command[0] == "ssh-keygen":
            run_program(command)
        if command[0] == "useradd":
            with open(self.root / "etc/passwd", "a") as passwd:
                passwd.write("migrate:x:999:999::/var/lib/migrate/peer:/bin/sh\n")
            with open(self.root / "etc/group", "a") as group:
                group.write("migrate:x:999:\n")

    def set_up(self, address: str | None = None, host_id: int | None = None) -> Host:
        return set_up(self.place, Wishes(self.name, host_id, address or f"10.0.0.{self.number}"))

    def write(self, path: Path, text: str) -> None:
        self.place_of(path).write_text(text)

    def read(self, path: Path) -> str:
        return self.place_of(path).read_text()

    def place_of(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def config(self) -> Config:
        return load_config(self.place_of(paths.CONFIG_FILE), os.getuid())

    def hosts(self) -> dict[str, tuple[int, str, int]]:
        return {host.name: (host.id, host.address, host.port) for host in self.config().hosts}

    def state(self) -> dict[str, str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path): path.read_text() for path in files}


@pytest.fixture
def machines(tmp_path: Path) -> list[Machine]:
    """node1, node2 and node3, not yet set up."""
    return [Machine(tmp_path / f"node{n}", f"node{n}", n) for n in (1, 2, 3)]


def connect(caller: Machine, acceptor: Machine, **wishes: object) -> Host:
    def ask(command: Sequence[str], question: bytes) -> bytes:
        assert command[0] == "ssh"
        return accept(acceptor.place, question) + b"\n"

    return join(caller.place, Target(acceptor.name, **wishes), ask)  # type: ignore[arg-type]


# --- setup ---


def test_setup_makes_what_migd_needs_with_the_right_modes(machines: list[Machine]) -> None:
    node, *_ = machines
    assert node.set_up() == Host("node1", 1, "10.0.0.1")
    modes = {
        paths.CONFIG_DIR: 0o755,
        paths.CONFIG_FILE: 0o644,
        paths.SSH_DIR: 0o700,
        paths.SSH_KEY: 0o600,
        paths.KNOWN_HOSTS: 0o600,
        paths.STATE_DIR: 0o755,
        paths.PEER_HOME: 0o755,
        paths.AUTHORIZED_KEYS.parent: 0o755,
        paths.AUTHORIZED_KEYS: 0o644,
        paths.RUN_DIR: 0o755,
        paths.GUESTS_DIR: 0o700,
    }
    for path, mode in modes.items():
        assert (str(path), oct(stat.S_IMODE(node.place_of(path).stat().st_mode))) == (
            str(path),
            oct(mode),
        )
    parse_public_key(node.read(paths.SSH_PUBLIC_KEY), "node1")
    assert node.ran[0].startswith("useradd --system --user-group --home-dir /var/lib/migrate/peer")


def test_modes_do_not_depend_on_the_umask(machines: list[Machine]) -> None:
    before = os.umask(0o077)
    try:
        machines[0].set_up()
    finally:
        os.umask(before)
    assert stat.S_IMODE(machines[0].place_of(paths.CONFIG_FILE).stat().st_mode) == 0o644
    assert stat.S_IMODE(machines[0].place_of(paths.PEER_HOME).stat().st_mode) == 0o755


def test_setup_again_changes_nothing(machines: list[Machine]) -> None:
    node, *_ = machines
    node.set_up()
    node.write(paths.CONFIG_FILE, node.read(paths.CONFIG_FILE) + "# mine\n")
    before = node.state()
    ran = list(node.ran)
    set_up(node.place)
    assert node.state() == before
    assert node.ran == ran


def test_setup_takes_no_wish_that_contradicts_the_file(machines: list[Machine]) -> None:
    node, *_ = machines
    node.set_up()
    with pytest.raises(UserError, match="this host's id is 1 already"):
        node.set_up(host_id=5)


def test_the_id_is_the_number_in_the_name(machines: list[Machine]) -> None:
    assert machines[2].set_up().id == 3
    place = machines[0].place
    assert set_up(place, Wishes("web", address="10.0.0.9")).id == 1


def test_without_an_address_one_is_found(machines: list[Machine]) -> None:
    host = set_up(machines[0].place, Wishes("node1"))
    assert host.address == "node1" or socket.getaddrinfo(
        host.address, 9, flags=socket.AI_NUMERICHOST
    )


@pytest.mark.parametrize(
    "wishes",
    [Wishes("a b"), Wishes("-x"), Wishes("n", address="-oX"), Wishes("n", 0), Wishes("n", port=0)],
)
def test_setup_refuses_what_cannot_be(machines: list[Machine], wishes: Wishes) -> None:
    with pytest.raises((UserError, ConfigError)):
        set_up(machines[0].place, wishes)
    assert not machines[0].place_of(paths.CONFIG_FILE).exists()


def test_a_person_called_migrate_is_left_alone(machines: list[Machine]) -> None:
    node, *_ = machines
    node.write(Path("/etc/passwd"), "migrate:x:1000:1000::/home/migrate:/bin/bash\n")
    with pytest.raises(HostError, match="exists already, with the home /home/migrate"):
        node.set_up()
    assert node.ran == []


def test_without_systemd_no_service_is_made(machines: list[Machine]) -> None:
    machines[0].set_up()
    assert not machines[0].place_of(paths.SYSTEMD_UNIT).exists()
    assert not any("systemctl" in line for line in machines[0].ran)


def test_the_service_is_written_and_started_where_systemd_runs(machines: list[Machine]) -> None:
    node, *_ = machines
    (node.root / "etc/systemd/system").mkdir(parents=True)
    node.set_up()
    unit = node.read(paths.SYSTEMD_UNIT)
    for line in ("Type=notify", "ExecStart=/opt/migrate/bin/migd", "KillMode=process"):
        assert line in unit.splitlines()
    assert "RuntimeDirectory" not in unit
    assert not any("systemctl" in line for line in node.ran)
    (node.root / "run/systemd/system").mkdir(parents=True)
    node.set_up()
    assert node.ran[-1] == "systemctl enable --now --no-block migd.socket migd.service"
    assert "ListenStream=/run/migrate/load.sock" in node.read(paths.SYSTEMD_SOCKET)


def test_remove_takes_everything_away(machines: list[Machine]) -> None:
    node, *_ = machines
    before = node.state()
    (node.root / "etc/systemd/system").mkdir(parents=True)
    node.set_up()
    node.write(Path("/etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n" + passwd_line())
    remove(node.place)
    assert node.ran[-2:] == ["userdel migrate", "groupdel migrate"]
    after = node.state()
    for accounts in ("etc/passwd", "etc/group"):
        del after[str(node.root / accounts)], before[str(node.root / accounts)]
    assert after == before
    for path in (paths.CONFIG_DIR, paths.STATE_DIR, paths.RUN_DIR):
        assert not node.place_of(path).exists()


def passwd_line() -> str:
    return "migrate:x:999:999::/var/lib/migrate/peer:/bin/sh\n"


def test_remove_does_nothing_to_a_host_never_set_up(machines: list[Machine]) -> None:
    before = machines[0].state()
    remove(machines[0].place)
    assert machines[0].state() == before


def test_remove_refuses_while_guests_are_here(machines: list[Machine]) -> None:
    node, *_ = machines
    node.set_up()
    (node.place_of(paths.GUESTS_DIR) / "0x1a2b").mkdir()
    with pytest.raises(UserError, match="has guests"):
        remove(node.place)
    assert node.place_of(paths.CONFIG_FILE).exists()


def test_remove_refuses_while_migd_listens(
    machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, *_ = machines
    node.set_up()
    monkeypatch.chdir(node.root)  # The whole path may be too long for a socket's.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind("run/migrate/peer.sock")
        sock.listen()
        place = Place(Path(), node.run, os.getuid(), BRIDGE)
        with pytest.raises(UserError, match="still running"):
            remove(place)


def test_a_boot_brings_the_runtime_directories_back(machines: list[Machine]) -> None:
    node, *_ = machines
    make_runtime_directories(node.place)
    assert stat.S_IMODE(node.place_of(paths.GUESTS_DIR).stat().st_mode) == 0o700


def test_files_under_a_closed_directory_are_told(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "bridge.py").touch()
    with pytest.raises(HostError, match="is closed to others"):
        check_readable_by_all(closed / "bridge.py")


def test_a_file_is_replaced_as_a_whole_and_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    (tmp_path / "file").symlink_to(elsewhere)
    assert write_file(tmp_path / "file", "new", 0o640)
    assert elsewhere.read_text() == "untouched"
    assert stat.S_IMODE((tmp_path / "file").lstat().st_mode) == 0o640
    assert not write_file(tmp_path / "file", "new", 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "file"]


# --- join ---


def test_joined_hosts_know_each_others_keys_and_addresses(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    assert connect(node1, node2) == Host("node2", 2, "10.0.0.2")
    everyone = {"node1": (1, "10.0.0.1", 22), "node2": (2, "10.0.0.2", 22)}
    for this, other in ((node1, node2), (node2, node1)):
        assert this.hosts() == everyone
        key = " ".join(other.read(paths.SSH_PUBLIC_KEY).split()[:2])
        assert this.read(paths.AUTHORIZED_KEYS) == (
            'restrict,command="/opt/migrate/bin/python -I -S /opt/migrate/lib/agent/bridge.py '
            f'{other.name}" {key} migrate@{other.name}\n'
        )
        assert this.read(paths.KNOWN_HOSTS) == f"{other.name} {key_of(other.number)}\n"


def test_three_pairs_make_a_cluster(machines: list[Machine]) -> None:
    node1, node2, node3 = machines
    for node in machines:
        node.set_up()
    for caller, acceptor in ((node1, node2), (node1, node3), (node2, node3)):
        connect(caller, acceptor)
    assert node1.hosts() == node2.hosts() == node3.hosts()
    for node in machines:
        assert node.read(paths.KNOWN_HOSTS).count("\n") == 2
        assert node.read(paths.AUTHORIZED_KEYS).count("\n") == 2


def test_joining_again_changes_nothing(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    connect(node1, node2)
    before = [node1.state(), node2.state()]
    connect(node1, node2)
    connect(node2, node1)
    assert [node1.state(), node2.state()] == before


def test_joining_again_replaces_keys(machines: list[Machine]) -> None:
    node1, node2, node3 = machines
    for node in machines:
        node.set_up()
    connect(node1, node2)
    connect(node1, node3)
    old = node2.read(paths.SSH_PUBLIC_KEY).split()[1]
    node2.place_of(paths.SSH_KEY).unlink()
    node2.set_up()
    node2.write(paths.HOST_PUBLIC_KEY, key_of(77))
    connect(node1, node2)
    keys = node1.read(paths.AUTHORIZED_KEYS)
    assert old not in keys
    assert node2.read(paths.SSH_PUBLIC_KEY).split()[1] in keys
    assert keys.count("migrate@node2") == keys.count("migrate@node3") == 1
    assert f"node2 {key_of(77)}\n" in node1.read(paths.KNOWN_HOSTS)


def test_the_rest_of_the_file_stays_as_it_was_written(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    mine = (
        "# Mine.\n"
        "lost_seconds=90 # long\n\n"
        "[[host]] # me\n"
        "id    = 1\n"
        "name  = 'node1'\n"
        "address = '10.0.0.1'\n"
        "\t# no newline at the end"
    )
    node1.write(paths.CONFIG_FILE, mine.replace("# Mine.\n", "# Mine.\nname = 'node1'\n"))
    connect(node1, node2)
    text = node1.read(paths.CONFIG_FILE)
    assert text.startswith(mine.replace("# Mine.\n", "# Mine.\nname = 'node1'\n"))
    assert node1.hosts().keys() == {"node1", "node2"}


def test_address_port_and_id_can_be_given(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    connect(node1, node2, address="fd00::2", ssh_port=2222, host_id=9)
    assert node1.hosts()["node2"] == (9, "fd00::2", 2222)
    assert node2.hosts() == {"node2": (9, "10.0.0.2", 22), "node1": (1, "10.0.0.1", 22)}


def test_what_was_corrected_by_hand_stays_when_joining_again(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    connect(node1, node2)
    for node in (node1, node2):
        text = node.read(paths.CONFIG_FILE).replace("10.0.0.2", "node2.lan")
        node.write(paths.CONFIG_FILE, text)
    connect(node1, node2)
    connect(node2, node1)
    assert node1.hosts()["node2"][1] == "node2.lan"
    connect(node1, node2, address="10.9.9.9")
    assert node1.hosts()["node2"][1] == "10.9.9.9"
    assert node2.hosts()["node2"][1] == "node2.lan"


def test_fresh_hosts_of_the_same_id_are_told_apart(tmp_path: Path) -> None:
    names = ("alpha", "beta", "gamma")
    nodes = [Machine(tmp_path / name, name, n) for n, name in enumerate(names, 1)]
    for node in nodes:
        assert node.set_up().id == 1
    connect(nodes[0], nodes[1])
    connect(nodes[2], nodes[0])  # The newcomer asks.
    connect(nodes[1], nodes[2])
    assert nodes[0].hosts() == nodes[1].hosts() == nodes[2].hosts()
    assert sorted(number for number, _, _ in nodes[0].hosts().values()) == [1, 2, 3]


def test_the_ssh_command_has_nothing_of_ours_in_its_remote_part(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()
    seen: list[Sequence[str]] = []

    def ask(command: Sequence[str], question: bytes) -> bytes:
        seen.append(command)
        return b"login noise\n" + accept(node2.place, question) + b"\n"

    join(node1.place, Target("node2.lan", "admin", 2222), ask)
    (command,) = seen
    assert command[-2:] == ["node2.lan", "/opt/migrate/bin/migctl accept-join"]
    assert command[command.index("-l") + 1] == "admin"
    assert command[command.index("-p") + 1] == "2222"


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "", "host;x"])
def test_a_host_that_ssh_could_misread_is_refused(machines: list[Machine], host: str) -> None:
    machines[0].set_up()
    with pytest.raises(UserError):
        join(machines[0].place, Target(host), lambda *_: pytest.fail("asked"))


def card(name: str = "node2", key: str | None = None, **host: object) -> dict[str, object]:
    entry = {"name": name, "id": 2, "address": "10.0.0.2", "port": 22, **host}
    return {"host": entry, "key": key_of(42) if key is None else key, "host_key": key_of(43)}


HOSTILE_CARDS = [
    card(name='node2" ssh-ed25519 x'),
    card(name="node2\nnode3"),
    card(name="../x"),
    card(name="node1"),
    card(address='10.0.0.2"\n[[host]]'),
    card(address="-oProxyCommand=x"),
    card(address="10.0.0.1"),
    card(id=1),
    card(id=0),
    card(id="2"),
    card(port=0),
    card(extra=1),
    card(key='command="/bin/sh" ' + key_of(42)),
    card(key="ssh-rsa AAAA"),
    card(key=key_of(42)[:-4]),
    card(key=key_of(42) + "A"),
    card(key=key_of(42).replace(" ", " !")),
    card(key="ssh-ed25519"),
    card(key=""),
]


@pytest.mark.parametrize("hostile", HOSTILE_CARDS)
def test_a_hostile_answer_changes_nothing(
    machines: list[Machine], hostile: dict[str, object]
) -> None:
    node1, *_ = machines
    node1.set_up()
    before = node1.state()
    answer = json.dumps({"type": "answer", "card": hostile, "your_id": 1}).encode()
    with pytest.raises(MigrateError) as error:
        join(node1.place, Target("node2"), lambda *_: answer)
    assert node1.state() == before
    assert str(error.value).isprintable()


@pytest.mark.parametrize("hostile", HOSTILE_CARDS)
def test_a_hostile_request_changes_nothing(
    machines: list[Machine], hostile: dict[str, object]
) -> None:
    node1, _, node3 = machines
    node1.set_up()
    node3.set_up()
    connect(node3, node1)
    before = node1.state()
    request = {"type": "request", "protocol": 1, "card": hostile, "others": {"node9": 9}}
    answer = msgspec.json.decode(
        accept(node1.place, json.dumps(request).encode()), type=JoinAnswer | JoinRefusal
    )
    assert isinstance(answer, JoinRefusal)
    assert node1.state() == before


def test_a_comment_with_a_second_line_is_dropped(machines: list[Machine]) -> None:
    node1, *_ = machines
    node1.set_up()
    smuggled = card(key=key_of(42) + ' x\ncommand="/bin/sh" ' + key_of(44))
    answer = json.dumps({"type": "answer", "card": smuggled, "your_id": 1}).encode()
    join(node1.place, Target("node2"), lambda *_: answer)
    text = node1.read(paths.AUTHORIZED_KEYS)
    assert text.count("\n") == 1
    assert text.endswith(f'node2" {key_of(42)} migrate@node2\n')


@pytest.mark.parametrize("answer", [b"", b"garbage", b"{}", b"[1]", b"\xff", b"x" * 100_000])
def test_an_answer_that_makes_no_sense_is_told(machines: list[Machine], answer: bytes) -> None:
    machines[0].set_up()
    with pytest.raises(PeerError, match="host node2: its answer"):
        join(machines[0].place, Target("node2"), lambda *_: answer)


@pytest.mark.parametrize("question", [b"", b"garbage", b"{}", b"\xff"])
def test_a_request_that_makes_no_sense_is_refused(machines: list[Machine], question: bytes) -> None:
    machines[0].set_up()
    answer = msgspec.json.decode(accept(machines[0].place, question), type=JoinRefusal)
    assert answer.what == "the request to join"


def test_another_version_is_refused_there_and_told_here(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    node1.set_up()
    node2.set_up()

    def ask(command: Sequence[str], question: bytes) -> bytes:
        request = msgspec.json.decode(question, type=JoinRequest)
        newer = msgspec.structs.replace(request, protocol=2)
        return accept(node2.place, msgspec.json.encode(newer))

    with pytest.raises(PeerError, match=r"speaks protocol 2, this host 1; install the same"):
        join(node1.place, Target("node2"), ask)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (255, "host node2: ssh cannot log in there; try: ssh node2"),
        (127, "host node2: there is no /opt/x/migctl; install migrate there, or give --migctl"),
        (1, "host node2: migctl failed there with status 1"),
    ],
)
def test_an_ssh_that_fails_is_told(status: int, message: str) -> None:
    script = f"import sys; sys.stdin.read(); sys.exit({status})"
    command = [sys.executable, "-c", script, "node2", "/opt/x/migctl accept-join"]
    with pytest.raises(PeerError) as error:
        ask_program(command, b"question")
    assert str(error.value) == message


def test_two_hosts_of_one_name_are_told_apart_by_a_person(machines: list[Machine]) -> None:
    node1, *_ = machines
    node1.set_up()
    with pytest.raises(PeerError, match=r"^host node1: both hosts have this name; give one"):
        connect(node1, node1)


def test_a_host_not_set_up_says_so_to_both(machines: list[Machine]) -> None:
    node1, node2, _ = machines
    with pytest.raises(ConfigError, match="run `migctl setup`"):
        connect(node1, node2)
    node1.set_up()
    with pytest.raises(PeerError, match=r"host node2: .*config\.toml: .*run `migctl setup`"):
        connect(node1, node2)


def test_a_copied_disk_is_recognized(machines: list[Machine]) -> None:
    node1, node2, node3 = machines
    for node in machines:
        node.set_up()
    node2.write(paths.SSH_PUBLIC_KEY, node1.read(paths.SSH_PUBLIC_KEY))
    with pytest.raises(PeerError, match="has the same key as this host"):
        connect(node1, node2)
    connect(node1, node3)
    node2.write(paths.SSH_PUBLIC_KEY, node3.read(paths.SSH_PUBLIC_KEY))
    with pytest.raises(ConfigError, match="host node2: has the same key as host node3"):
        connect(node1, node2)


def test_a_host_without_sshd_keys_says_how_to_make_them(machines: list[Machine]) -> None:
    machines[0].set_up()
    machines[0].place_of(paths.HOST_PUBLIC_KEY).unlink()
    with pytest.raises(HostError, match="ssh-keygen -A"):
        join(machines[0].place, Target("node2"), lambda *_: pytest.fail("asked"))


# --- ids ---


def test_ids_stay_where_they_can() -> None:
    assert agree_on_ids(Standing("a", 1), Standing("b", 2), None) == (1, 2)
    assert agree_on_ids(Standing("a", 1, {"c": 3}), Standing("b", 2, {"c": 3}), None) == (1, 2)


def test_a_fresh_host_gives_way() -> None:
    assert agree_on_ids(Standing("a", 1), Standing("b", 1), None) == (1, 2)
    assert agree_on_ids(Standing("a", 1, {"c": 2}), Standing("b", 1), None) == (1, 3)
    assert agree_on_ids(Standing("a", 1), Standing("b", 1, {"c": 2}), None) == (3, 1)
    assert agree_on_ids(Standing("a", 2), Standing("b", 1, {"c": 2}), None) == (3, 1)


def test_a_host_made_anew_gets_its_old_id() -> None:
    assert agree_on_ids(Standing("a", 1, {"b": 7}), Standing("b", 1), None) == (1, 7)
    assert agree_on_ids(Standing("b", 1), Standing("a", 1, {"b": 7}), None) == (7, 1)


def test_a_wanted_id_is_given_or_refused() -> None:
    assert agree_on_ids(Standing("a", 1), Standing("b", 2), 9) == (1, 9)
    for caller, acceptor, wanted, message in (
        (Standing("a", 1, {"c": 3}), Standing("b", 2), 3, "its id 3 is already that of host c"),
        (Standing("a", 1), Standing("b", 2, {"c": 3}), 9, "has the id 2 among its peers already"),
        (Standing("a", 1, {"c": 3}), Standing("b", 1, {"d": 2}), None, "its id 1 is already"),
        (Standing("a", 1, {"b": 5}), Standing("b", 2, {"c": 3}), None, "lists it with id 5"),
        (Standing("a", 1), Standing("a", 2), None, "both hosts have this name"),
    ):
        with pytest.raises(ConfigError, match=message):
            agree_on_ids(caller, acceptor, wanted)


# --- the texts ---


def test_a_first_file_is_right_and_says_what_it_is_for() -> None:
    config = parse_config(first_text(Host("node1", 1, "::1", 2222)))
    assert config.this_host == Host("node1", 1, "::1", 2222)


def test_a_changed_host_is_changed_in_place() -> None:
    text = first_text(Host("a", 1, "10.0.0.1")) + '[[host]]\nname="b"\nid = 2 # b\naddress="x"\n'
    changed = with_host(text, Host("b", 7, "10.0.0.7", 2222))
    assert "id = 7 # b\n" in changed
    assert 'address="10.0.0.7"\n' in changed
    assert parse_config(changed.replace('name = "a"', 'name = "b"', 1)).hosts[1].port == 2222
    assert changed.splitlines()[:10] == text.splitlines()[:10]


def test_a_form_that_cannot_be_edited_is_left_to_its_owner() -> None:
    text = 'name = "a"\nhost = [{name = "a", id = 1, address = "x"}]\n'
    with pytest.raises(ConfigError):
        with_host(text, Host("b", 2, "y"))
    with pytest.raises(ConfigError):
        with_host(text, Host("a", 3, "x"))


def test_a_command_line_that_needs_quoting_is_refused() -> None:
    key = parse_public_key(key_of(1), "x")
    for bad in ('/opt/a b/"x', "/opt/$(x)", "relative"):
        with pytest.raises(HostError, match="authorized_keys cannot hold safely"):
            authorize("", "node1", key, Bridge(Path(bad), Path("/b.py")))
    with pytest.raises(ConfigError, match="not a host's name"):
        authorize("", 'node1" x', key, BRIDGE)
    with pytest.raises(ConfigError, match="not a host's name"):
        know("", "a\nb", key)


def test_lines_of_others_are_kept() -> None:
    one, two = parse_public_key(key_of(1), "x"), parse_public_key(key_of(2), "x")
    text = authorize("# by hand\nssh-ed25519 AAAA admin@here\n", "node1", one, BRIDGE)
    text = authorize(text, "node10", two, BRIDGE)
    assert [line.split()[-1] for line in text.splitlines()] == [
        *("hand", "admin@here", "migrate@node1", "migrate@node10")
    ]


def test_ssh_keygen_reads_what_was_written(tmp_path: Path) -> None:
    key = parse_public_key(key_of(9), "x")
    (tmp_path / "keys").write_text(authorize("", "node1", key, BRIDGE))
    (tmp_path / "hosts").write_text(know("", "node1", key))
    run_program(["ssh-keygen", "-l", "-f", str(tmp_path / "keys")])
    run_program(["ssh-keygen", "-F", "node1", "-f", str(tmp_path / "hosts")])


# --- the command line ---


def migctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "migrate.admin", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "migctl: No such command 'bogus'; see `migctl --help`\n"),
        (["join"], "migctl: Missing argument '"),
        (["join", "node2", "--id", "x"], "migctl: Invalid value for '--id'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_125(arguments: list[str], message: str) -> None:
    done = migctl(*arguments)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_help_shows_the_commands_but_the_hidden_one() -> None:
    done = migctl()
    assert done.returncode == 0
    assert "setup" in done.stdout and "join" in done.stdout
    assert "accept-join" not in done.stdout


def test_nothing_slow_is_imported() -> None:
    code = (
        "import sys, migrate.admin, migrate.join, migrate.setup;"
        "print({'paramiko', 'psutil', 'pycriu', 'asyncio', 'agent', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
