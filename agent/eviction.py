"""Sends this host's guests home, or wherever they may go: not written yet, this is where it belongs.

Called when the host's owner comes back, by `evict`, by Mig_Evict, and when the central daemon takes a
host from a user who holds many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.errors import HostError

if TYPE_CHECKING:
    from agent.this_host import ThisHost


def evict_guests(here: ThisHost, uid: int | None, reason: str) -> int:
    """Have guests leave.

    :param uid: whose; None for everybody's.
    :return: how many are told to go.
    :raises HostError: always, while there are such guests: it is not written yet.
    """
    guests = [guest for guest in here.load_guests() if uid is None or guest.uid == uid]
    if guests:
        count = sum(guest.count for guest in guests)
        raise HostError(
            f"host {here.name}", f"cannot evict its {count} guests: that is not written yet"
        )
    return 0
