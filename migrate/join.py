"""`migctl join HOST`: two hosts learn each other's keys and addresses, over one ssh connection.

That connection is the administrator's own, and is why what comes over it is believed. Each side
still checks every word before it writes one.
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from migrate import paths
from migrate.config import (
    Config,
    Host,
    is_address,
    is_host_name,
    parse_config,
    read_config_text,
)
from migrate.config_edit import with_host
from migrate.errors import ConfigError, HostError, MigrateError, PeerError, UserError
from migrate.files import locked, write_file
from migrate.framing import MALFORMED
from migrate.join_ids import Standing, agree_on_ids
from migrate.place import Place
from migrate.trust import PublicKey, authorize, know, parse_public_key

PROTOCOL = 1
ANSWER_LIMIT_BYTES = 1 << 16
REMOTE_MIGCTL = paths.INSTALL_DIR / "bin" / "migctl"

Ask = Callable[[Sequence[str], bytes], bytes]
"""Runs a command with the given input, its stderr and terminal being ours; returns its output."""


class Card(msgspec.Struct, frozen=True):
    """What a host tells about itself. The keys are lines of OpenSSH public key files."""

    host: Host
    key: str
    host_key: str

    def check(self) -> None:
        """:raises ConfigError: it says what no host can be."""
        if not is_host_name(self.host.name):
            raise ConfigError(f"host {self.host.name!r}", "not a host's name")
        if not is_address(self.host.address):
            raise ConfigError(
                f"host {self.host.name}", f"{self.host.address!r} is no IP address or DNS name"
            )


class JoinRequest(msgspec.Struct, frozen=True, tag="request"):
    """From the host where `migctl join` was typed."""

    protocol: int
    card: Card
    others: dict[str, int]
    """The hosts it knows, with their ids."""
    wanted_id: int | None = None


class JoinAnswer(msgspec.Struct, frozen=True, tag="answer"):
    """It has been done there; `your_id` is what the caller is called there."""

    card: Card
    your_id: int


class JoinRefusal(msgspec.Struct, frozen=True, tag="refusal"):
    """Nothing has been done there."""

    what: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Target:
    """The other host as the administrator reaches it, and what she said about it."""

    host: str
    ssh_user: str = "root"
    ssh_port: int | None = None
    address: str | None = None
    host_id: int | None = None
    migctl: Path = REMOTE_MIGCTL


def ask_program(command: Sequence[str], question: bytes) -> bytes:
    """An `Ask` for real.

    :raises PeerError: the command fails; what it had to say it said on our stderr.
    """
    what = f"host {command[-2]}"
    try:
        done = subprocess.run(command, input=question, stdout=subprocess.PIPE, check=False)
    except OSError as error:
        raise HostError(command[0], f"cannot be run: {error.strerror}") from error
    if done.returncode in (126, 127):
        program = command[-1].split()[0]
        raise PeerError(what, f"there is no {program}", "install migrate there, or give --migctl")
    if done.returncode == 255:
        raise PeerError(what, "ssh cannot log in there", f"try: ssh {command[-2]}")
    if done.returncode != 0:
        raise PeerError(what, f"migctl failed there with status {done.returncode}")
    return done.stdout


def join(place: Place, target: Target, ask: Ask = ask_program) -> Host:
    """Set the trust up between this host and `target`, both ways.

    :returns: the other host's entry in the configuration.
    :raises MigrateError: why not. If it failed after the other side had done its part, joining
        again completes it.
    """
    if target.host.startswith("-") or not is_address(target.host):
        raise UserError(f"host {target.host!r}", "is no host name or address")
    if target.address is not None and not is_address(target.address):
        raise UserError(f"address {target.address!r}", "is no IP address or DNS name")
    config = _own_config(place)
    request = JoinRequest(
        PROTOCOL, _own_card(place, config.this_host), _others(config), target.host_id
    )
    answer = _understand(ask(_ssh_command(target), msgspec.json.encode(request)), target.host)
    answer.card.check()
    theirs = answer.card.host
    listed = _listed(config, theirs.name) or theirs
    host = Host(
        theirs.name,
        theirs.id,
        target.address or listed.address,
        target.ssh_port or listed.port,
    )
    own = msgspec.structs.replace(config.this_host, id=answer.your_id)
    _learn(place, own, host, answer.card)
    return host


def accept(place: Place, question: bytes) -> bytes:
    """The other side of `join`: what the hidden command `migctl accept-join` does with its input.

    :returns: the answer to print; also if it is no.
    """
    try:
        return msgspec.json.encode(_accept(place, question))
    except MigrateError as error:
        return msgspec.json.encode(JoinRefusal(error.what, error.reason, error.remedy))


def _accept(place: Place, question: bytes) -> JoinAnswer:
    try:
        request = msgspec.json.decode(question, type=JoinRequest)
    except MALFORMED as error:
        raise PeerError("the request to join", f"makes no sense: {error}") from None
    if request.protocol != PROTOCOL:
        raise PeerError(
            "the request to join",
            f"speaks protocol {request.protocol}, this host {PROTOCOL}",
            "install the same version on both hosts",
        )
    request.card.check()
    config = _own_config(place)
    caller = request.card.host
    their_id, own_id = agree_on_ids(
        Standing(caller.name, caller.id, request.others),
        Standing(config.name, config.this_host.id, _others(config)),
        request.wanted_id,
    )
    own = msgspec.structs.replace(config.this_host, id=own_id)
    listed = _listed(config, caller.name) or caller
    host = Host(caller.name, their_id, listed.address, listed.port)
    card = _own_card(place, own)
    _learn(place, own, host, request.card)
    return JoinAnswer(card, their_id)


def _understand(output: bytes, host: str) -> JoinAnswer:
    what = f"host {host}"
    # A login script there may have printed something before.
    last = output.strip().rpartition(b"\n")[2]
    if len(last) > ANSWER_LIMIT_BYTES:
        raise PeerError(what, "its answer is too long")
    try:
        answer = msgspec.json.decode(last, type=JoinAnswer | JoinRefusal)
    except MALFORMED:
        raise PeerError(what, "its answer makes no sense", "is it the same version?") from None
    if isinstance(answer, JoinRefusal):
        about = _printable(answer.what)
        named = about if about == what else f"{what}: {about}"
        raise PeerError(named, _printable(answer.reason), _printable(answer.remedy))
    return answer


def _learn(place: Place, own: Host, other: Host, card: Card) -> None:
    """Believe the card of the other host: everything is worked out before anything is written."""
    if other.name == own.name:
        raise ConfigError(f"host {own.name}", "the other host calls itself so, too")
    key = parse_public_key(card.key, f"host {other.name}")
    host_key = parse_public_key(card.host_key, f"host {other.name}'s sshd")
    if key == _read_key(place, paths.SSH_PUBLIC_KEY) or host_key == _read_key(
        place, paths.HOST_PUBLIC_KEY
    ):
        raise ConfigError(
            f"host {other.name}",
            "has the same key as this host: one is a copy of the other's disk",
            "make new keys there (/etc/migrate/ssh, /etc/ssh/ssh_host_*)",
        )
    config_file = place.at(paths.CONFIG_FILE)
    keys_file, known_file = place.at(paths.AUTHORIZED_KEYS), place.at(paths.KNOWN_HOSTS)
    with locked(place.at(paths.CONFIG_DIR)):
        text = with_host(read_config_text(config_file, place.owner_uid), own, config_file)
        text = with_host(text, other, config_file)
        keys = authorize(_read(keys_file), other.name, key, place.bridge)
        known = know(_read(known_file), other.name, host_key)
        write_file(known_file, known, 0o600)
        changed = write_file(config_file, text, 0o644)
        # Last: from here on the other host may enter.
        write_file(keys_file, keys, 0o644)
    if changed and place.runs_systemd:
        place.run(["systemctl", "try-reload-or-restart", "--no-block", paths.SYSTEMD_UNIT.name])


def _ssh_command(target: Target) -> list[str]:
    port = ["-p", str(target.ssh_port)] if target.ssh_port is not None else []
    return [
        *("ssh", "-T", "-a", "-x", "-o", "ConnectTimeout=10", *port),
        *("-l", target.ssh_user, "--", target.host, f"{target.migctl} accept-join"),
    ]


def _own_config(place: Place) -> Config:
    path = place.at(paths.CONFIG_FILE)
    return parse_config(read_config_text(path, place.owner_uid), path)


def _own_card(place: Place, host: Host) -> Card:
    key = _read_key(place, paths.SSH_PUBLIC_KEY)
    host_key = _read_key(place, paths.HOST_PUBLIC_KEY)
    return Card(host, str(key), str(host_key))


def _others(config: Config) -> dict[str, int]:
    return {host.name: host.id for host in config.peers}


def _listed(config: Config, name: str) -> Host | None:
    """What an administrator wrote about a host stands, and is not changed by joining again."""
    return next((host for host in config.hosts if host.name == name), None)


def _read_key(place: Place, path: Path) -> PublicKey:
    remedy = "run `migctl setup`" if path == paths.SSH_PUBLIC_KEY else "run `ssh-keygen -A`"
    try:
        return parse_public_key(place.at(path).read_text(), "this host")
    except OSError as error:
        raise HostError(str(path), f"cannot be read: {error.strerror}", remedy) from error


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(str(path), f"cannot be read: {error}") from error


def _printable(text: str) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:300]
