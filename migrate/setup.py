"""What `migctl setup` does to a host, and `migctl setup --remove` undoes. Both may be repeated."""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from migrate import pam, paths
from migrate.config import (
    Config,
    Host,
    is_address,
    is_host_name,
    load_config,
    parse_config,
)
from migrate.config_edit import first_text
from migrate.errors import HostError, UserError
from migrate.files import locked, make_directory, write_file
from migrate.place import Place, check_readable_by_all

RUNTIME_DIRECTORIES = ((paths.RUN_DIR, 0o755), (paths.GUESTS_DIR, 0o700))
"""Gone after a boot: migd makes them as well."""

_DIRECTORIES = (
    (paths.CONFIG_DIR, 0o755),
    (paths.SSH_DIR, 0o700),
    (paths.STATE_DIR, 0o755),
    (paths.PEER_HOME, 0o755),
    (paths.AUTHORIZED_KEYS.parent, 0o755),
    *RUNTIME_DIRECTORIES,
)

_UNITS = (paths.SYSTEMD_SOCKET.name, paths.SYSTEMD_UNIT.name)

# Guards and keepers are started by migd and outlive it: KillMode=process, and no RuntimeDirectory,
# which systemd would remove with their sockets in it.
_UNIT = """\
[Unit]
Description=Process migration (migd)
Documentation=man:migd(8)
After=network-online.target ssh.service migd.socket
Wants=network-online.target migd.socket

[Service]
Type=notify
ExecStart={migd}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""


_SOCKET_UNIT = f"""\
[Unit]
Description=Process migration (the Mig library's way to migd)
Documentation=man:migd(8)

[Socket]
ListenStream={paths.LOAD_SOCKET}
SocketMode=0666
DirectoryMode=0755
Backlog=1024
FileDescriptorName=load

[Install]
WantedBy=sockets.target
"""


@dataclass(frozen=True)
class Wishes:
    """What the administrator said about this host; None is what can be found out."""

    name: str | None = None
    host_id: int | None = None
    address: str | None = None
    port: int | None = None


def set_up(place: Place, wishes: Wishes = Wishes()) -> Host:
    """Make everything that migd needs and that is not there. What is there is kept.

    :returns: this host's entry in the configuration.
    :raises MigrateError: something is in the way; what was done until then stays, and helps the
        next attempt.
    """
    if place.root == Path("/"):
        for path in (place.bridge.python, place.bridge.script):
            check_readable_by_all(path)
    _make_user(place)
    for path, mode in _DIRECTORIES:
        make_directory(place.at(path), mode)
    with locked(place.at(paths.CONFIG_DIR)):
        config = _make_config(place, wishes)
        _make_key(place, config.name)
        for path, mode in ((paths.AUTHORIZED_KEYS, 0o644), (paths.KNOWN_HOSTS, 0o600)):
            if not place.at(path).exists():
                write_file(place.at(path), "", mode)
    _make_service(place)
    return config.this_host


def make_runtime_directories(place: Place) -> None:
    """/run/migrate and what is below it, which a boot removes. For migd at its start."""
    for path, mode in RUNTIME_DIRECTORIES:
        make_directory(place.at(path), mode)


def remove(place: Place) -> None:
    """Take away everything that `set_up` and `migctl join` have made here.

    :raises UserError: guests are here, or migd runs and nobody can stop it.
    """
    guests = place.at(paths.GUESTS_DIR)
    if guests.is_dir() and any(guests.iterdir()):
        raise UserError("this host", "has guests or processes away", "`migctl ps` shows them")
    unit = place.at(paths.SYSTEMD_UNIT)
    if unit.exists():
        if place.runs_systemd:
            place.run(["systemctl", "disable", "--now", *_UNITS])
        unit.unlink()
        place.at(paths.SYSTEMD_SOCKET).unlink(missing_ok=True)
        if place.runs_systemd:
            place.run(["systemctl", "daemon-reload"])
    if _migd_listens(place):
        raise UserError("migd", "is still running", "stop it first")
    pam.disable(place)
    for path in (paths.RUN_DIR, paths.STATE_DIR, paths.CONFIG_DIR):
        if place.at(path).exists():
            shutil.rmtree(place.at(path))
    if _entry(place, "passwd") is not None:
        place.run(["userdel", paths.PEER_USER])
    if _entry(place, "group") is not None:
        place.run(["groupdel", paths.PEER_USER])


def _make_user(place: Place) -> None:
    entry = _entry(place, "passwd")
    if entry is not None:
        home = entry[5] if len(entry) > 5 else ""
        if home != str(paths.PEER_HOME):
            raise HostError(
                f"user {paths.PEER_USER}",
                f"exists already, with the home {home}",
                "rename that user: migrate needs the name",
            )
        return
    group = ["--gid", paths.PEER_USER] if _entry(place, "group") else ["--user-group"]
    place.run(
        [
            *("useradd", "--system", *group),
            *("--home-dir", str(paths.PEER_HOME), "--no-create-home"),
            # sshd runs forced commands with the user's shell; "*" is no password and no lock.
            *("--shell", "/bin/sh", "--password", "*"),
            *("--comment", "connections of other hosts", paths.PEER_USER),
        ]
    )


def _entry(place: Place, database: str) -> list[str] | None:
    """The fields of `migrate` in passwd or group."""
    try:
        text = place.at(Path("/etc") / database).read_text()
    except FileNotFoundError:
        return None
    lines = (line.split(":") for line in text.splitlines())
    return next((fields for fields in lines if fields[0] == paths.PEER_USER), None)


def _make_config(place: Place, wishes: Wishes) -> Config:
    path = place.at(paths.CONFIG_FILE)
    if not path.exists():
        text = first_text(_describe(wishes))
        parse_config(text, path)
        write_file(path, text, 0o644)
    config = load_config(path, place.owner_uid)
    host = config.this_host
    asked = (wishes.name, wishes.host_id, wishes.address, wishes.port)
    for key, wish, present in zip(
        ("name", "id", "address", "port"),
        asked,
        (host.name, host.id, host.address, host.port),
        strict=True,
    ):
        if wish is not None and wish != present:
            reason = f"this host's {key} is {present} already"
            raise UserError(str(path), reason, "edit the file, here and on its peers")
    return config


def _describe(wishes: Wishes) -> Host:
    name = wishes.name or os.uname().nodename.partition(".")[0]
    if not is_host_name(name):
        raise UserError(f"name {name!r}", "cannot be a host's name", "give another with --name")
    address = wishes.address or _own_address() or name
    if not is_address(address):
        raise UserError(f"address {address!r}", "is no IP address or DNS name")
    host_id = wishes.host_id if wishes.host_id is not None else _id_in(name)
    return Host(name, host_id, address, wishes.port if wishes.port is not None else 22)


def _id_in(name: str) -> int:
    """node3 is 3, so that hosts numbered by their names need no more; others begin with 1."""
    digits = name[len(name.rstrip("0123456789")) :]
    number = int(digits) if 0 < len(digits) <= 5 else 1
    return number if 1 <= number <= 65535 else 1


def _own_address() -> str | None:
    """The address this host has on its way out, by its routes; nothing is sent."""
    # 192.0.2.1 and 2001:db8::1 are documentation's own (RFC 5737, RFC 3849).
    for family, outside in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((outside, 9))
                return str(sock.getsockname()[0])
        except OSError:
            continue
    return None


def _make_key(place: Place, name: str) -> None:
    key, public = place.at(paths.SSH_KEY), place.at(paths.SSH_PUBLIC_KEY)
    if key.exists() and public.exists():
        return
    if key.exists():
        raise HostError(str(public), "is missing", f"make it: ssh-keygen -y -f {key} >{public}")
    public.unlink(missing_ok=True)
    comment = f"{paths.PEER_USER}@{name}"
    place.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(key)])


def _make_service(place: Place) -> None:
    unit = place.at(paths.SYSTEMD_UNIT)
    if not unit.parent.is_dir():
        return
    text = _UNIT.format(migd=place.bridge.python.parent / "migd")
    changed = write_file(unit, text, 0o644)
    changed |= write_file(place.at(paths.SYSTEMD_SOCKET), _SOCKET_UNIT, 0o644)
    if place.runs_systemd:
        if changed:
            place.run(["systemctl", "daemon-reload"])
        # A migd that runs already keeps the socket of its own: then systemd's waits for the next start.
        place.run(["systemctl", "enable", "--now", "--no-block", *_UNITS])


def _migd_listens(place: Place) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(place.at(paths.PEER_SOCKET)))
    except OSError:
        return False
    return True
