"""Why a guest that lives does not run just now; its cgroup is frozen while there is a reason."""

from __future__ import annotations

from agent.cgroups import Cgroup


class Standstill:
    """Of one guest, as its keeper knows it."""

    def __init__(self, tree: Cgroup) -> None:
        self._tree = tree
        self._cut = False
        self._held = ""
        self._ours = False
        """born, and no criu has it: its cgroup is ours to freeze and to thaw"""
        self._leaving = False

    @property
    def held(self) -> str:
        """Why this host wants it gone; "" if it does not."""
        return self._held

    def let_run(self) -> None:
        """It is here, and may run unless there is a reason against it."""
        self._ours, self._leaving = True, False
        self._apply()

    def leave(self) -> None:
        """A departure begins, which freezes it itself: from here on nobody else lets it run."""
        self._leaving = True

    def lend(self) -> None:
        """It is frozen, and criu's, which lets it stop and go as it needs. Until `let_run`."""
        self._ours = False

    def cut(self, is_cut: bool) -> None:
        """Home is silent for too long, or no longer."""
        self._cut = is_cut
        self._apply()

    def hold(self, reason: str) -> None:
        """This host wants it gone; or, with an empty reason, no longer."""
        self._held = reason
        self._apply()

    def _apply(self) -> None:
        if not self._ours:
            return
        if self._cut or self._held:
            self._tree.freeze()
        elif not self._leaving:
            self._tree.thaw()
