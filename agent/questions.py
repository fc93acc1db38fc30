"""What other hosts' migds may ask of this one, and the answers."""

from __future__ import annotations

import logging

import msgspec

from agent import load_messages, peer_messages
from agent.group_travel import GroupTravel
from agent.guest_lines import connect_next
from agent.handover import tell_nobody
from agent.hopping import hop
from agent.hosting import judge
from agent.journal import Entry, Side, State
from agent.link import Attach, Offer
from agent.peers import IncomingConnection
from agent.this_host import ThisHost
from migrate.errors import PeerError
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)


_decode = msgspec.msgpack.Decoder(peer_messages.Question | load_messages.LoadQuestion).decode


class Questions:
    """Answers for the peers; who asks is proved by its key."""

    def __init__(self, here: ThisHost, travel: GroupTravel) -> None:
        self._here = here
        self._travel = travel

    def is_peer(self, name: str) -> bool:
        """Whether a host of this name is configured now."""
        return any(host.name == name for host in self._here.config.peers)

    def answer_at_once(self, peer: str, payload: bytes) -> bytes | None:
        """The answer to what costs no time: the load database's. Raises MigrateError."""
        try:
            question = _decode(payload)
        except MALFORMED:
            return None  # `answer` says why.
        if isinstance(question, load_messages.LoadQuestion):
            return self._here.load.answer_now(peer, question)
        return None

    async def answer(self, peer: str, payload: bytes) -> bytes:
        """A question of another migd. Raises MigrateError, which is told to it."""
        try:
            question = _decode(payload)
        except MALFORMED as error:
            raise PeerError(
                "question", f"makes no sense here ({error})", "use the same version"
            ) from None
        if isinstance(question, load_messages.LoadQuestion):
            return await self._here.load.answer(peer, question)
        return peer_messages.encode(await self._answer(peer, question))

    async def _answer(self, peer: str, question: peer_messages.Question) -> peer_messages.Answer:
        here = self._here
        match question:
            case peer_messages.MakeOffer(offer):
                return self._take_in(offer, peer)
            case peer_messages.AskOutcome(transaction):
                entry = here.journal.find(transaction, Side.DESTINATION)
                state = entry.state if entry is not None and entry.peer == peer else ""
                return peer_messages.OutcomeIs(str(state), here.boot_id)
            case peer_messages.AskGuest(guest):
                return peer_messages.GuestIs(here.keeper_of(guest, peer) is not None)
            case peer_messages.AskHome(guest):
                wanted = here.agents.find("guard", guest) is not None
                return peer_messages.HomeIs(wanted, here.boot_id)
            case peer_messages.DropGuest(guest):
                if here.keeper_of(guest, peer) is not None:
                    here.end_guest(guest, "home has given it up")
                return peer_messages.GuestIs(False)
            case peer_messages.MoveGuest(guest, destination, chosen):
                if here.keeper_of(guest, peer) is None:
                    raise PeerError(f"guest {guest}", "is not here", "look with `migctl ps`")
                host = here.config.host_named(destination)
                return await hop(here, guest, host, tell_nobody, chosen=chosen)
            case peer_messages.SetGroup() as news:
                return self._travel.told(peer, news)
            case peer_messages.ConnectGuest(guest, host):
                where = [
                    e.peer
                    for e in here.journal.in_state(State.RESUMED)
                    if e.guest == guest and e.side is Side.SOURCE and e.origin_cgroup
                ]
                if where != [peer]:
                    raise PeerError(f"guest {guest}", f"does not run on {peer}")
                here.config.host_named(host)
                await connect_next(here, guest, host)
                return peer_messages.Connected()

    def _take_in(self, offer: Offer, peer: str) -> peer_messages.Accepted:
        here = self._here
        known = here.agents.find("keeper", offer.guest)
        if known is not None and known.offer == offer and offer.source == peer:
            return peer_messages.Accepted(here.boot_id)  # its last answer was lost
        judge(offer, peer, here.config, here.criu_version)
        if offer.home != here.name:
            here.load.host.check_offer(offer.priority, chosen=offer.chosen)
        if not offer.guest.replace("-", "").isalnum() or not offer.transaction.isalnum():
            raise PeerError("offer", "its names are malformed")
        if known is not None:
            raise PeerError(f"host {here.name}", "that guest is here already")
        here.journal.record(Entry.begin(offer, Side.DESTINATION, peer))
        place = "local" if offer.home == here.name else "remote"
        agent = here.agents.start("keeper", offer.guest, offer, place)
        agent.link.socket.send(msgspec.msgpack.encode(offer))
        here.load.host.guests_changed()
        log.info("%s: offer of %s from %s accepted", offer.transaction, offer.guest, peer)
        return peer_messages.Accepted(here.boot_id)

    async def incoming(self, connection: IncomingConnection) -> None:
        """A raw connection of a peer: to the keeper that it names."""
        try:
            agent = self._here.agents.find("keeper", connection.token)
            if agent is None or agent.offer is None:
                log.info(
                    "host %s: asks for %s, which is not here", connection.peer, connection.token
                )
                return
            wanted = agent.offer.source if connection.purpose == "bulk" else agent.offer.home
            if connection.peer != wanted:
                log.warning("host %s: may not reach %s", connection.peer, connection.token)
                return
            fds = (connection.fd_in, connection.fd_out, connection.fd_hold)
            agent.link.send(Attach(connection.purpose, connection.peer), fds)
        finally:
            connection.close()
