"""The criu program, as it is started inside a capsule whose /usr may be another host's.

There the file system belongs, in part, to the guest's home. Neither criu nor its libraries, plugins or
configuration may come from there: criu runs as root. So the capsule holds, at a place of its own that
only root can enter, this host's system directories, read-only, and criu is started from them by its
own loader (ld.so(8): --library-path, --inhibit-cache).
"""

from __future__ import annotations

import os
from pathlib import Path

from migrate.errors import HostError

CRIU_PATHS = ("/usr/sbin/criu", "/usr/local/sbin/criu")
KEPT_DIR = Path("/run/migrate/criu")
"""Inside a capsule only: the host's system directories, what else criu reads, and START."""
HOST_DIRECTORIES = ("usr", "lib", "lib32", "lib64", "libx32")
"""What is bound below KEPT_DIR, as far as the host has them as directories."""
START = KEPT_DIR / "start"
"""The words to start criu with in this capsule, one a line."""
PLUGINS = KEPT_DIR / "plugins"
_PLUGIN_DIRS = (Path("/usr/lib/criu"), Path("/usr/local/lib/criu"))
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
_DEFAULT_LIBRARIES = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")


def criu_path() -> str:
    """Full path of the criu binary (swrk refuses a bare name). Raises HostError: there is none."""
    for path in CRIU_PATHS:
        if os.access(path, os.X_OK):
            return path
    raise HostError("criu", "is not installed", "install Debian's criu, 4.2 or newer")


def exec_swrk(fd: int) -> None:
    """Become `criu swrk FD`; in a capsule of another home, the kept one. Raises OSError, HostError."""
    try:
        words = START.read_text().splitlines()
    except FileNotFoundError:
        os.execv(criu_path(), ["criu", "swrk", str(fd)])
    # No file of HOME's, no plugins but this host's.
    environment = {"CRIU_LIBS_DIR": str(PLUGINS), "PATH": "/nonexistent"}
    os.execve(words[0], [*words, "--no-default-config", "swrk", str(fd)], environment)


def start_words() -> list[str]:
    """How to start this host's criu from KEPT_DIR. To be asked where the host's own root is seen.

    :raises HostError: criu or its loader is not here.
    """
    loader = _LOADERS.get(os.uname().machine, "")
    if not Path(loader).is_file():
        raise HostError("criu", f"has no known loader on {os.uname().machine}")
    libraries = ":".join(dict.fromkeys(_kept(path) for path in library_directories()))
    return [_kept(loader), "--inhibit-cache", "--library-path", libraries, _kept(criu_path())]


def plugin_directory() -> Path | None:
    """Where this host's criu has its plugins; None if it has none."""
    return next((path for path in _PLUGIN_DIRS if path.is_dir()), None)


def library_directories(root: Path = Path("/")) -> list[str]:
    """Where this host looks for libraries: ld.so.conf(5) and the loader's own."""
    found = _configured(root, root / "etc/ld.so.conf", 0)
    return [path for path in (*found, *_DEFAULT_LIBRARIES) if (root / path.lstrip("/")).is_dir()]


def _configured(root: Path, file: Path, depth: int) -> list[str]:
    found: list[str] = []
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] == "include" and depth < 4:
            pattern = words[1] if words[1].startswith("/") else f"/etc/{words[1]}"
            for included in sorted(root.glob(pattern.lstrip("/"))):
                found += _configured(root, included, depth + 1)
        elif len(words) == 1 and words[0].startswith("/"):
            found.append(words[0])
    return found


def _kept(path: str) -> str:
    """Where a file of the host's lies within the capsule. Links are followed now: there they lead elsewhere."""
    return str(KEPT_DIR) + os.path.realpath(path)
