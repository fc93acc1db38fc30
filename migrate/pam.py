"""`migctl pam`: whether logins at this host send its guests home, by way of PAM (pam_exec(8)).

The distribution's own program edits /etc/pam.d, from a profile; without it, nothing is touched.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from migrate import paths
from migrate.errors import HostError
from migrate.files import make_directory, write_file
from migrate.place import Place

PROFILE_NAME = "migrate"
PROFILE = Path("/usr/share/pam-configs") / PROFILE_NAME
HOOK = Path("/usr/local/lib/migrate/login-hook")
_UPDATE = Path("/usr/sbin/pam-auth-update")

# dd alone opens and writes without ever waiting: not for a reader that is not there (ENXIO), nor
# for one that does not read (EAGAIN).
_HOOK_TEXT = f"""\
#!/bin/sh
# Tells migd of a session that PAM has opened. Takes a few milliseconds, whatever state migd is in,
# and never fails. Made by `migctl pam enable`.
PATH=/usr/bin:/bin
[ "$PAM_TYPE" = open_session ] && [ "$PAM_USER" != {paths.PEER_USER} ] || exit 0
printf '%s\\t%s\\t%s\\n' "$PAM_SERVICE" "$PAM_USER" "$PAM_RHOST" |
    dd of={paths.LOGIN_FIFO} bs=4096 count=1 oflag=nonblock conv=nocreat,notrunc >/dev/null 2>&1
exit 0
"""

_PROFILE_TEXT = f"""\
Name: Send migrated processes home when somebody logs in (migrate)
Default: no
Priority: 0
Session-Type: Additional
Session-Interactive-Only: yes
Session:
\toptional\tpam_exec.so quiet type=open_session {HOOK}
"""


def enable(place: Place) -> None:
    """Have every login told to migd. May be repeated.

    :raises HostError: this distribution has another way to edit /etc/pam.d.
    """
    _require_update(place)
    make_directory(place.at(HOOK.parent), 0o755)
    write_file(place.at(HOOK), _HOOK_TEXT, 0o755)
    write_file(place.at(PROFILE), _PROFILE_TEXT, 0o644)
    _update(place, "--enable", PROFILE_NAME)


def disable(place: Place) -> None:
    """Undo `enable`. May be repeated.

    :raises HostError: see there.
    """
    if place.at(PROFILE).exists():
        _require_update(place)
        _update(place, "--package", "--remove", PROFILE_NAME)
        place.at(PROFILE).unlink()
    place.at(HOOK).unlink(missing_ok=True)
    with suppress(OSError):
        place.at(HOOK.parent).rmdir()


def _require_update(place: Place) -> None:
    if not os.access(place.at(_UPDATE), os.X_OK):
        raise HostError(
            str(_UPDATE),
            "is not there: /etc/pam.d is edited in another way on this distribution",
            f"have it run {HOOK} by pam_exec at the start of a session, as {PROFILE} would say",
        )


def _update(place: Place, *words: str) -> None:
    place.run(["env", "DEBIAN_FRONTEND=noninteractive", str(_UPDATE), *words])
