"""Changes to the text of config.toml that leave all the rest of it as its owner wrote it.

Every change is checked by reading the new text as a whole before anybody writes it.
"""

import json
import re
from pathlib import Path

from migrate import paths
from migrate.config import Config, Host, find_line, parse_config
from migrate.errors import ConfigError

_BEGINNING = """\
# The hosts of the cluster and this host's settings. `migctl join HOST` adds hosts.
# Every host has its own copy; names, ids and addresses must be the same in all of them.

name = {name}

# Longest freeze, in seconds, before a migration is given up:
# freeze_limit_seconds = 10
# Directories that all hosts share anyway (NFS):
# shared_paths = ["/srv/shared"]
# Whether processes of other hosts may come here:
# accept_guests = true
"""


def first_text(host: Host) -> str:
    """The file of a host that knows only itself."""
    return _BEGINNING.format(name=json.dumps(host.name)) + _block(host)


def with_host(text: str, host: Host, path: Path = paths.CONFIG_FILE) -> str:
    """The text with this host in it: added at the end, or what differs changed in place.

    :raises ConfigError: the text is wrong, or would be then.
    """
    config = parse_config(text, path)
    index = _index(config, host.name)
    if index is None:
        if text and not text.endswith("\n"):
            text += "\n"
        changed = text + _block(host)
    else:
        listed, changed = config.hosts[index], text
        for key in ("id", "address", "port"):
            if getattr(listed, key) != getattr(host, key):
                changed = _with_value(changed, index, key, getattr(host, key), path)
    after = parse_config(changed, path)
    if host not in after.hosts:
        raise _by_hand(path, host)
    return changed


def _with_value(text: str, index: int, key: str, value: str | int, path: Path) -> str:
    lines = text.splitlines(keepends=True)
    head, line = find_line(text, ("host", index)), find_line(text, ("host", index, key))
    if head is None or line is None:
        raise ConfigError(str(path), f"{key} of [[host]] {index + 1} cannot be found to change it")
    written = json.dumps(value)
    if line == head:
        lines.insert(head, f"{key} = {written}\n")
    else:
        # A lambda, because the value is no pattern.
        old = lines[line - 1]
        simple = r"""(\s*["']?\w+["']?\s*=\s*)("[^"]*"|'[^']*'|[^\s#"']+)(\s*(?:#.*)?\n?)"""
        lines[line - 1], found = re.subn(
            rf"\A{simple}\Z", lambda match: match[1] + written + match[3], old
        )
        if not found:
            raise ConfigError(f"{path}:{line}", f"{key} is written in a way not understood here")
    return "".join(lines)


def _index(config: Config, name: str) -> int | None:
    return next((n for n, host in enumerate(config.hosts) if host.name == name), None)


def _block(host: Host) -> str:
    lines = [
        "",
        "[[host]]",
        f"name = {json.dumps(host.name)}",
        f"id = {host.id}",
        f"address = {json.dumps(host.address)}",
    ]
    if host.port != 22:
        lines.append(f"port = {host.port}")
    return "\n".join(lines) + "\n"


def _by_hand(path: Path, host: Host) -> ConfigError:
    return ConfigError(str(path), f"cannot be changed for host {host.name}", "add it by hand")
