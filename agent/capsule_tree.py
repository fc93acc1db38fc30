"""The tree that goes on from a capsule, as its keeper sees it."""

from __future__ import annotations

from collections.abc import Callable

from agent.capsule import Capsule
from agent.cgroups import Cgroup, guest_path
from agent.identity import take_identity
from agent.link import Dumped, Offer, Planned


class CapsuleTree:
    """The original of a hop (or of the way home).

    :param plan: what will probably travel.
    :param describe: once all is frozen: settle the streams and say what travels with them.
    :param resume: the hop has failed: tree and streams go on here.
    """

    def __init__(
        self,
        offer: Offer,
        capsule: Capsule,
        plan: Callable[[], Planned],
        describe: Callable[[], Dumped],
        resume: Callable[[], None],
        terminal_keys: tuple[str, ...] = (),
    ) -> None:
        self.pid = offer.ids.pid
        self.shell_job = offer.ids.sid != offer.ids.pid
        self.cgroup = Cgroup(guest_path("keeper", offer.guest, "tree"))
        self._offer = offer
        self.proc_fd = capsule.proc_fd
        self._capsule = capsule
        self._plan = plan
        self._describe = describe
        self._resume = resume
        self.terminal_keys = terminal_keys

    def plan(self) -> Planned:
        """See the class."""
        return self._plan()

    def gather(self) -> None:
        """It lives in its cgroup already."""

    def enter(self) -> None:
        """criu dumps from inside, so that the namespaces are not part of the images."""
        self._capsule.enter()
        take_identity(self._offer.owner.uid, self._offer.owner.gid)

    def describe(self) -> Dumped:
        """See the class."""
        return self._describe()

    def put_back(self) -> None:
        """It stays here."""
        self._resume()
