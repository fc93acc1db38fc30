"""What of a guest's files comes from its home: as the destination decides it, for the capsule."""

from __future__ import annotations

import os
from pathlib import Path

from agent.capsule_root import RootPlan
from agent.home_paths import below, outermost
from agent.link import Offer, Programs, SystemFile
from agent.programs import LOCAL_TREES

PROGRAM_DIRECTORIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt")
"""They go together: what is in them is made for each other."""
PROGRAM_SETTINGS = tuple(
    f"/etc/{name}"
    for name in (
        *("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "locale.alias"),
        *("bash.bashrc", "profile", "profile.d", "inputrc", "terminfo", "mime.types", "magic"),
        *("fonts", "perl", "python3", "java", "ssl", "ca-certificates", "emacs", "vim"),
    )
)
"""What of /etc belongs to the programs. Accounts, names and the network stay the host's."""
OPTIONAL = (*PROGRAM_DIRECTORIES, *PROGRAM_SETTINGS, *LOCAL_TREES)


def plan_root(offer: Offer, here: Programs, view: Path, root: Path = Path("/")) -> RootPlan:
    """Lay these from home.

    :param here: this host's programs.
    :param view: where home's root directory is mounted.
    :param root: this host's root directory.
    """
    directories = list(offer.view)
    files: list[str] = []
    if not _same(offer.programs.packages, here.packages):
        directories += (*PROGRAM_DIRECTORIES, *PROGRAM_SETTINGS)
    for number, tree in enumerate(LOCAL_TREES):
        theirs, ours = (p.local_trees[number : number + 1] for p in (offer.programs, here))
        if not (theirs and ours and _same(theirs[0], ours[0])):
            directories.append(tree)
    for file in offer.files:
        if below(file.path, directories) or _is_here(file, root):
            continue
        if below(file.path, ("/usr",)) and not os.path.lexists(root / file.path[1:]):
            directories += PROGRAM_DIRECTORIES  # a /usr that is not what its packages say
        elif file.size < 0:
            directories.append(file.path)
        else:
            files.append(file.path)
    kept = outermost(directories)
    return RootPlan(
        view,
        kept,
        tuple(path for path in files if not below(path, kept)),
        frozenset((*offer.view, *OPTIONAL)),
    )


def _same(one: str, other: str) -> bool:
    return bool(one) and one == other


def _is_here(file: SystemFile, root: Path) -> bool:
    path = root / file.path[1:]
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if file.size < 0:
        return path.is_dir() and not path.is_symlink()
    return (status.st_size, int(status.st_mtime)) == (file.size, file.mtime_seconds)
