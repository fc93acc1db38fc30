"""Whether two hosts have the same programs: an identity for the packages, and for what is beside them.

Hosts with the same identity use their own /usr for guests; else home's is used, over the home view.
The identities are compared, never trusted: a wrong one costs the guest that it names, nobody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

import msgspec

from agent.link import Programs
from migrate import paths
from migrate.errors import HostError
from migrate.files import write_file

DPKG_STATUS = Path("/var/lib/dpkg/status")
LOCAL_TREES = ("/usr/local", "/opt")
"""Beside the packages: compared file by file (names, kinds, sizes, times)."""
MAX_ENTRIES = 5000
"""A local tree with more is not compared: it comes from home."""
_CACHE = paths.RUN_DIR / "packages"
_FIELD = re.compile(r"^(?:Package|Status|Version|Architecture): .*$", re.MULTILINE)


class _Cached(msgspec.Struct):
    size: int
    mtime_ns: int
    identity: str


def programs_here() -> Programs:
    """This host's."""
    return Programs(package_identity(), tuple(tree_identity(Path(p)) for p in LOCAL_TREES))


def package_identity(status_file: Path = DPKG_STATUS, cache: Path = _CACHE) -> str:
    """Of the installed packages with their versions and architectures; "" where dpkg is not in use.

    Remembered, since the file is large, until it changes.
    """
    try:
        status = status_file.stat()
    except OSError:
        return ""
    try:
        known = msgspec.json.decode(cache.read_bytes(), type=_Cached)
        if (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return known.identity
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        pass
    text = status_file.read_text(errors="replace")
    installed = [
        fields
        for paragraph in text.split("\n\n")
        if "install ok installed" in (fields := "\n".join(sorted(_FIELD.findall(paragraph))))
    ]
    identity = hashlib.sha256("\n\n".join(sorted(installed)).encode()).hexdigest()
    found = _Cached(status.st_size, status.st_mtime_ns, identity)
    with contextlib.suppress(HostError):  # then it is read again the next time
        write_file(cache, msgspec.json.encode(found).decode(), 0o600)
    return identity


def tree_identity(top: Path) -> str:
    """Of all that lies below a directory; "" if that is too much. A missing one is like an empty one.

    Compiled Python files are left out: they follow from others, whose size and time are compared.
    """
    digest = hashlib.sha256()
    todo = [""]
    entries = 0
    while todo:
        below = todo.pop()
        try:
            with os.scandir(top / below) as found:
                listed = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        entries += len(listed)
        if entries > MAX_ENTRIES:
            return ""
        for entry in listed:
            if entry.name == "__pycache__":
                continue
            name = f"{below}/{entry.name}".lstrip("/")
            if entry.is_symlink():
                word = f"link {Path(entry.path).readlink()}"
            elif entry.is_dir():
                word = "directory"
                todo.append(name)
            else:
                status = entry.stat(follow_symlinks=False)
                word = f"{status.st_mode:o} {status.st_size} {int(status.st_mtime)}"
            digest.update(f"{name}\0{word}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
