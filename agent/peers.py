"""This host's connections to all its peers: one to ask on, and as many for bytes as are needed.

The parts: peer_control (questions and answers), peer_pool and peer_raw (bytes), peer_server (what
comes in), peer_hello (the first words of each).
"""

from agent.peer_control import ControlConnection
from agent.peer_errors import AnswerLost, ConnectionCut, PeerUnreachable
from agent.peer_hello import Hello, own_hello
from agent.peer_identity import DEFAULT_IDENTITY, DEFAULT_PATIENCE, Identity, Patience
from agent.peer_pool import RawPool
from agent.peer_raw import RawConnection
from agent.peer_server import Bounds, IncomingConnection, PeerServer
from migrate.config import Host

__all__ = [
    "AnswerLost",
    "Bounds",
    "ConnectionCut",
    "ControlConnection",
    "Hello",
    "Identity",
    "IncomingConnection",
    "Patience",
    "PeerServer",
    "PeerUnreachable",
    "Peers",
    "RawConnection",
    "RawPool",
    "own_hello",
]

SPARES = 4
"""A first migration takes two, for the images and for the lifeline; another may follow soon."""


class Peers:
    """The calling side, for the running loop: `async with Peers(own) as peers`."""

    def __init__(
        self,
        own: Hello,
        identity: Identity = DEFAULT_IDENTITY,
        patience: Patience = DEFAULT_PATIENCE,
    ) -> None:
        self._own = own
        self._identity = identity
        self._patience = patience
        self._controls: dict[str, ControlConnection] = {}
        self.raw = RawPool(own, identity, patience, spares=SPARES)

    async def __aenter__(self) -> "Peers":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def control(self, peer: Host) -> ControlConnection:
        """The one control connection to this peer; a new one if its address was changed."""
        known = self._controls.get(peer.name)
        if known is not None and known.peer == peer:
            return known
        if known is not None:
            known.close()
        made = ControlConnection(
            peer,
            self._own,
            self._identity,
            self._patience,
            on_lost=lambda: self.raw.distrust(peer),
        )
        self._controls[peer.name] = made
        return made

    async def aclose(self) -> None:
        """End all control connections and spares; raw connections in use live on."""
        for control in self._controls.values():
            control.close()
        self._controls.clear()
        await self.raw.aclose()
