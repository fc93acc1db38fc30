"""/etc/migrate/config.toml, typed: the hosts of the cluster and this host's settings.

A wrong file never half works: unknown keys are errors, and every error names file, line and key.
"""

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from migrate import paths
from migrate.errors import ConfigError, UserError

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Load = Annotated[float, msgspec.Meta(ge=0, le=10000)]
Loads = tuple[Load, Load, Load]
HostId = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

DEFAULT_CANDIDATES = 3
LOGINS_HERE = (
    *("login", "greetd", "lemurs", "ly", "lxdm", "nodm", "slim", "wdm", "xdm"),
    *("gdm-password", "gdm-autologin", "gdm-fingerprint", "gdm-smartcard"),
    *("lightdm", "lightdm-autologin", "sddm", "sddm-autologin", "plasmalogin"),
)
"""What opens a session of somebody who sits at the host: login(1) and the display managers."""
LOST_MARGIN_SECONDS = 10.0
"""By how much `lost_seconds` must exceed `cut_freeze_seconds` (invariant 7)."""

# Names stand in authorized_keys, in command lines and in file names: nothing that any of these
# could read as syntax. An address must not look like an option of ssh.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9.:%_-]{0,254}", re.ASCII)

KeyPath = tuple[str | int, ...]


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[host]]` of the cluster. `port` is its sshd's."""

    name: str
    id: HostId
    address: str
    port: Port = 22


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says; what it does not say has its default."""

    hosts: tuple[Host, ...] = msgspec.field(name="host")
    name: str = ""
    """This host's name among `hosts`; by default the kernel's host name."""
    freeze_limit_seconds: Seconds = 10.0
    """Longest freeze before a migration is given up and the process runs on where it was."""
    cut_freeze_seconds: Seconds = 20.0
    """T1: a keeper that has not heard from home for so long freezes its guest."""
    lost_seconds: Seconds = 60.0
    """T2: home declares a guest lost that it has not heard of for so long."""
    connect_seconds: Seconds = 10.0
    """Longest time to connect to a peer."""
    peer_answer_seconds: Seconds = 5.0
    """A peer that does not answer a ping within it counts as dead."""
    ghost_limit_bytes: Bytes = 64 << 20
    """Deleted files that a process holds open travel with it up to this size each."""
    min_free_memory_bytes: Bytes = 256 << 20
    """Guests are refused that would leave this host less memory than this."""
    accept_guests: bool = True
    guest_slots: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Guests of one priority taken at once; 0: as many as there are processors."""
    idle_seconds: Seconds = 30.0
    """Guests are welcome when nobody has typed for so long."""
    load_accept: Loads = (0.75, 1.0, 1.5)
    """Load averages (1, 5, 15 min) a processor, below all of which guests become welcome …"""
    load_stop: Loads = (2.5, 2.75, 3.0)
    """… until one of these is exceeded."""
    sample_seconds: Seconds = 5.0
    """How often load and idle time are looked at."""
    report_seconds: Seconds = 60.0
    """Longest time between two reports to the central daemon; a change of state goes at once."""
    down_seconds: Seconds = 180.0
    """A host not heard of for so long is down."""
    give_back_seconds: Seconds = 15.0
    """A user asked for a host back has so long to return it."""
    central_candidates: tuple[str, ...] = ()
    """Who may be the central daemon, first choice first; by default the three lowest numbers."""
    owners: tuple[str, ...] = ()
    """Users who may block this host and send its guests home, as root may."""
    login_services: tuple[str, ...] = LOGINS_HERE
    """PAM services by which somebody logs in at this host itself: that sends guests home."""
    remote_logins: bool = False
    """Logins over the network send guests home as well."""
    remote_login_services: tuple[str, ...] = ("sshd", "remote", "xrdp-sesman", "cockpit")
    shared_paths: tuple[str, ...] = ()
    """Directories that all hosts share anyway (NFS): left out of the home view."""

    @property
    def this_host(self) -> Host:
        """The entry of the host this file belongs to."""
        return self.host_named(self.name)

    @property
    def peers(self) -> tuple[Host, ...]:
        """All hosts but this one."""
        return tuple(host for host in self.hosts if host.name != self.name)

    @property
    def candidates(self) -> tuple[Host, ...]:
        """The hosts that may be the central daemon, first choice first."""
        if self.central_candidates:
            return tuple(self.host_named(name) for name in self.central_candidates)
        return tuple(sorted(self.hosts, key=lambda host: host.id)[:DEFAULT_CANDIDATES])

    def host_named(self, name: str) -> Host:
        """:raises UserError: there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise UserError(f"host {name}", "not configured here", self._known())

    def host_with_id(self, host_id: int) -> Host:
        """:raises UserError: there is none."""
        for host in self.hosts:
            if host.id == host_id:
                return host
        raise UserError(f"host id {host_id}", "not configured here", self._known())

    def _known(self) -> str:
        names = ", ".join(f"{host.name} ({host.id})" for host in self.hosts)
        return f"the hosts are {names}; `migctl join` adds one"


def load_config(path: Path = paths.CONFIG_FILE, trusted_uid: int | None = None) -> Config:
    """Read and check the configuration.

    :param trusted_uid: the only uid that the file may belong to, and nobody else may be able to
        write it. By default 0 if root reads it; for other readers nothing is demanded.
    :raises ConfigError: the file is missing, not to be trusted, or wrong.
    """
    return parse_config(read_config_text(path, trusted_uid), path)


def read_config_text(path: Path, trusted_uid: int | None = None) -> str:
    """The text of the file, if it may be trusted; parameters and errors as `load_config`."""
    if trusted_uid is None and os.geteuid() == 0:
        trusted_uid = 0
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(str(path), "not a regular file")
            if trusted_uid is not None:
                _check_trust(path, status, trusted_uid)
            return file.read().decode()
    except FileNotFoundError:
        raise ConfigError(str(path), "there is no such file", "run `migctl setup`") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None


def parse_config(text: str, path: Path = paths.CONFIG_FILE) -> Config:
    """Check the text of a configuration file; `path` is what errors call it.

    :raises ConfigError: names the file, the line if it can be found, the key, and the reason.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), f"not valid TOML: {error}") from None
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        reason, where = _understand(str(error))
        _wrong(path, text, where, reason)
    if not config.name:
        config = msgspec.structs.replace(config, name=_default_name(config.hosts))
    _check_hosts(config, path, text)
    _check_settings(config, path, text)
    return config


def is_host_name(text: str) -> bool:
    """Whether a host may be called so."""
    return _NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    """Whether it can be an IP address or a DNS name (it may still not resolve)."""
    return _ADDRESS.fullmatch(text) is not None


def find_line(text: str, where: KeyPath) -> int | None:
    """The line (from 1) of a key like ``("host", 1, "id")``, or of the table it would stand in.

    It reads the file as a person does, line by line; of inline tables it knows nothing.
    """
    lines = text.splitlines()
    start, wanted = 0, where[-1] if where else None
    if len(where) >= 2 and where[0] == "host" and isinstance(where[1], int):
        heads = [n for n, line in enumerate(lines) if re.match(r"\s*\[\[\s*host\s*\]\]", line)]
        if where[1] >= len(heads):
            return None
        start = heads[where[1]]
        wanted = where[2] if len(where) > 2 else None
        if wanted is None:
            return start + 1
    elif wanted is not None and isinstance(wanted, int):
        wanted = where[0]
    for number in range(start, len(lines)):
        if number > start and lines[number].lstrip().startswith("["):
            break
        if re.match(rf"\s*[\"']?{re.escape(str(wanted))}[\"']?\s*=", lines[number]):
            return number + 1
    return start + 1 if start else None


def _check_trust(path: Path, status: os.stat_result, trusted_uid: int) -> None:
    if status.st_uid != trusted_uid:
        owner = "root" if trusted_uid == 0 else f"uid {trusted_uid}"
        raise ConfigError(
            str(path),
            f"belongs to uid {status.st_uid}, must belong to {owner}",
            f"chown {trusted_uid} {path}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(str(path), "others than its owner may write it", f"chmod go-w {path}")


def _check_hosts(config: Config, path: Path, text: str) -> None:
    taken: dict[tuple[str, object], str] = {}
    for index, host in enumerate(config.hosts):
        if not is_host_name(host.name):
            reason = f"{host.name!r} cannot be a host's name: letters, digits, '.', '_', '-'"
            _wrong(path, text, ("host", index, "name"), reason)
        if not is_address(host.address):
            reason = f"{host.address!r} is no IP address or DNS name"
            _wrong(path, text, ("host", index, "address"), reason)
        endpoint = f"{host.address.lower()} port {host.port}"
        for key, value in (("name", host.name), ("id", host.id), ("address", endpoint)):
            if (key, value) in taken:
                reason = f"{value} is already that of host {taken[key, value]}"
                _wrong(path, text, ("host", index, key), reason)
            taken[key, value] = host.name


def _check_settings(config: Config, path: Path, text: str) -> None:
    if all(host.name != config.name for host in config.hosts):
        reason = f"no [[host]] has this host's name, {config.name}"
        _wrong(path, text, ("name",), reason, "add one, or set name")
    least = config.cut_freeze_seconds + LOST_MARGIN_SECONDS
    if config.lost_seconds < least:
        reason = f"{config.lost_seconds:g} is too short after cut_freeze_seconds"
        _wrong(path, text, ("lost_seconds",), reason, f"make it at least {least:g}")
    if any(
        accept > stop for accept, stop in zip(config.load_accept, config.load_stop, strict=True)
    ):
        _wrong(path, text, ("load_accept",), "is above load_stop", "make it lower")
    if config.down_seconds <= config.report_seconds:
        _wrong(path, text, ("down_seconds",), "is not longer than report_seconds")
    names = [host.name for host in config.hosts]
    for index, name in enumerate(config.central_candidates):
        if name not in names or name in config.central_candidates[:index]:
            reason = f"{name} is named twice" if name in names else f"no [[host]] is called {name}"
            _wrong(path, text, ("central_candidates", index), reason)
    for index, shared in enumerate(config.shared_paths):
        if not shared.startswith("/") or os.path.normpath(shared) != shared or shared == "/":
            reason = f"{shared!r} must be an absolute path below /, without .. or a final /"
            _wrong(path, text, ("shared_paths", index), reason)


def _default_name(hosts: tuple[Host, ...]) -> str:
    """The kernel's host name, as the hosts spell it: with its domain or without."""
    full = os.uname().nodename
    names = {host.name for host in hosts}
    return full if full in names else full.partition(".")[0]


def _understand(message: str) -> tuple[str, KeyPath]:
    """Reason and key of msgspec's "Expected `int`, got `str` - at `$.host[0].id`"."""
    reason, _, at = message.partition(" - at ")
    where: list[str | int] = []
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", at):
        where.append(key or int(index))
    if named := re.search(r"(?:unknown|required) field `(.*?)`", reason):
        where.append(named[1])
        unknown = "unknown" in reason
        reason = "unknown key" if unknown else "missing"
    return reason.replace("`", ""), tuple(where)


def _wrong(path: Path, text: str, where: KeyPath, reason: str, remedy: str = "") -> NoReturn:
    line = find_line(text, where)
    place = f"{path}:{line}" if line else str(path)
    raise ConfigError(f"{place}: {_spell(where)}" if where else place, reason, remedy)


def _spell(where: KeyPath) -> str:
    """The key as a person says it: `id of [[host]] 2`."""
    if where[0] == "host" and len(where) > 1 and isinstance(where[1], int):
        table = f"[[host]] {where[1] + 1}"
        return f"{where[2]} of {table}" if len(where) > 2 else table
    return str(where[0])
