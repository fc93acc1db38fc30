"""Who comes while migd is being restarted waits for its successor; who comes where there is none is told so."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import bridge
from migrate import reaching

Reach = Callable[[socket.socket, str], None]
both = pytest.mark.parametrize("reach", [reaching.reach_migd, bridge._reach])


class Restarting(socket.socket):
    """A client's socket whose migd begins to listen when it has been refused twice."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(socket.AF_UNIX)
        self._listener = listener
        self.refused = 0

    def connect(self, path: object) -> None:
        try:
            super().connect(path)  # type: ignore[arg-type]
        except ConnectionRefusedError:
            self.refused += 1
            if self.refused == 2:
                self._listener.listen()
            raise


@both
def test_a_socket_that_refuses_is_tried_again(tmp_path: Path, reach: Reach) -> None:
    with socket.socket(socket.AF_UNIX) as listener, Restarting(listener) as client:
        listener.bind(str(tmp_path / "s"))
        reach(client, str(tmp_path / "s"))
        assert client.refused == 2
        listener.accept()[0].close()


@both
def test_who_is_refused_for_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: Reach
) -> None:
    for module in (reaching, bridge):
        monkeypatch.setattr(module, "RESTART_SECONDS", 0.0)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ConnectionRefusedError):
            reach(client, str(tmp_path / "s"))


@both
def test_without_a_socket_nothing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: Reach
) -> None:
    for module in (reaching, bridge):
        monkeypatch.setattr(module, "RESTART_SECONDS", float("inf"))
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        reach(client, str(tmp_path / "none"))
