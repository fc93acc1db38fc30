"""Where things lie on a host. One place, so that every program agrees."""

from pathlib import Path

from migrate import command_wire

CONFIG_DIR = Path("/etc/migrate")
CONFIG_FILE = CONFIG_DIR / "config.toml"

SSH_DIR = CONFIG_DIR / "ssh"
"""Root only, 0700: this host's own key and the host keys of its peers."""
SSH_KEY = SSH_DIR / "id_ed25519"
SSH_PUBLIC_KEY = SSH_DIR / "id_ed25519.pub"
KNOWN_HOSTS = SSH_DIR / "known_hosts"

HOST_PUBLIC_KEY = Path("/etc/ssh/ssh_host_ed25519_key.pub")
"""The key by which this host's own sshd proves who it is."""

STATE_DIR = Path("/var/lib/migrate")
JOURNAL = STATE_DIR / "journal.db"
LOAD_CHECKPOINT = STATE_DIR / "load.db"
"""Hosts that the central daemon knows, and its term."""
BLOCKED_FILE = STATE_DIR / "blocked"
"""There while an administrator wants no guests here; holds the reason."""
PEER_HOME = STATE_DIR / "peer"
"""Home of the system user `migrate`; root's own, so that the user cannot change who may enter."""
AUTHORIZED_KEYS = PEER_HOME / ".ssh" / "authorized_keys"

LOG_DIR = Path("/var/log/migrate")
"""`migd -L`: a file for this host and one for the central daemon."""

RUN_DIR = Path("/run/migrate")
MIGD_SOCKET = RUN_DIR / "migd.sock"
RUN_SOCKET = Path(command_wire.RUN_SOCKET)
"""Where users ask for commands to be run elsewhere."""
LOAD_SOCKET = RUN_DIR / "load.sock"
"""The Mig library's way to migd; open to every user."""
LOADAVG_FILE = RUN_DIR / "loadavg"
"""This host's own record (migrate.mig_messages.HostInfo as JSON); Sprite had a pseudo-device there."""
LOGIN_FIFO = RUN_DIR / "logins"
"""Root only: where the PAM hook tells of logins."""
GROUP_FILES = RUN_DIR / "proc"
"""A file system with `PID/miggroup`: the group of each process, for every user to read."""
GROUP_BOOK = RUN_DIR / "groups"
"""Root only: the same for the next migd."""
PEER_SOCKET = RUN_DIR / "peer.sock"
GUESTS_DIR = RUN_DIR / "guests"
"""Root only, 0700: one directory a guest, with its images and sockets."""

SYSTEMD_UNIT = Path("/etc/systemd/system/migd.service")
SYSTEMD_SOCKET = SYSTEMD_UNIT.with_suffix(".socket")
"""Who asks the Mig library has migd started by it, if it does not run."""

INSTALL_DIR = Path("/opt/migrate")
"""Where the README installs the product; another host's migctl is looked for there."""

PEER_USER = "migrate"
"""The system user (and group) that receives the connections of other hosts."""
