"""A host as `migctl` changes it: where its files are, and how programs are run on it."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from migrate.errors import HostError
from migrate.trust import Bridge

Run = Callable[[Sequence[str]], None]

_PACKAGES = Path(__file__).resolve().parent.parent


def run_program(command: Sequence[str]) -> None:
    """Run a program of this host to its end, silently.

    :raises HostError: it is missing or fails; the reason is its own last line.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise HostError(command[0], f"cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().rpartition("\n")[2]
        raise HostError(" ".join(command[:2]), said or f"failed with status {done.returncode}")


@dataclass(frozen=True)
class Place:
    """This host; or, for tests, a directory that stands for its root."""

    root: Path = Path("/")
    run: Run = run_program
    owner_uid: int = 0
    """Who owns what is made here, and must own what is trusted."""
    bridge: Bridge = field(
        default_factory=lambda: Bridge(Path(sys.executable), _PACKAGES / "agent" / "bridge.py")
    )

    def at(self, path: Path) -> Path:
        """Where an absolute path of the host lies."""
        return self.root / path.relative_to("/")

    @property
    def runs_systemd(self) -> bool:
        """Whether systemd is the init now (as sd_booted(3) finds out)."""
        return self.at(Path("/run/systemd/system")).is_dir()


def check_readable_by_all(path: Path) -> None:
    """See to it that sshd's user `migrate` can use a file that belongs to the installation.

    :raises HostError: it, or a directory above it, is closed to others.
    """
    real = path.resolve()
    for part in (real, *real.parents):
        needed = 0o001 if part != real else 0o004
        try:
            mode = part.stat().st_mode
        except OSError as error:
            raise HostError(str(part), f"cannot be looked at: {error.strerror}") from error
        if not mode & needed:
            raise HostError(
                str(path),
                f"the user migrate cannot reach it: {part} is closed to others",
                "install migrate under /opt/migrate",
            )
