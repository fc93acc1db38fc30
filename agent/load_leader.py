"""Who is the central daemon: what a migd concludes from the candidates' answers. No I/O.

The one that leads keeps leading. If none does, the first reachable candidate in the configured
order takes over with a higher term. Of two that lead, the one with the lower term steps down. For a
moment there may be two: they only advise, so that does no harm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Standing:
    """What a candidate says of itself. `term`: the highest it has ever seen."""

    leads: bool
    term: int


@dataclass(frozen=True)
class Follow:
    """This host leads."""

    host: str


@dataclass(frozen=True)
class Lead:
    """Take over (or go on), with this term."""

    term: int


@dataclass(frozen=True)
class Wait:
    """Somebody else should take over, but has not yet; look again soon."""


Decision = Follow | Lead | Wait


def decide(
    me: str,
    own: Standing,
    candidates: Sequence[str],
    answers: Mapping[str, Standing],
) -> Decision:
    """What to do now.

    :param candidates: in the configured order; `me` need not be one of them.
    :param answers: of those that answered; without `me`.
    """

    def rank(host: str) -> tuple[int, int]:
        standing = own if host == me else answers[host]
        return -standing.term, candidates.index(host)

    leaders = [
        host for host in candidates if host != me and host in answers and answers[host].leads
    ]
    if own.leads:
        best = min([me, *leaders], key=rank)
        return Lead(own.term) if best == me else Follow(best)
    if leaders:
        return Follow(min(leaders, key=rank))
    if me not in candidates:
        return Wait()
    before = candidates[: candidates.index(me)]
    if any(host in answers for host in before):
        return Wait()
    return Lead(1 + max([own.term, *(standing.term for standing in answers.values())]))
