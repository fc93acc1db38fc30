"""Home's end of the connection with one keeper: the lifeline, and the view that it carries."""

from __future__ import annotations

from collections.abc import Callable

from agent import guestwords
from agent.lifeline import Lifeline
from agent.link import Owner
from agent.reactor import Reactor
from agent.view_server import ViewServer
from agent.wire import ProtocolError
from migrate.errors import PeerError
from migrate.framing import MALFORMED


class HomeLine:
    """A guard has one, and during a hop a second one to the keeper that is to come.

    :param host: where that keeper is.
    :param serve_view: false for a keeper at home, whose guest sees this host's own files.
    """

    def __init__(
        self,
        reactor: Reactor,
        guest: str,
        host: str,
        owner: Owner,
        *,
        serve_view: bool,
        on_word: Callable[[HomeLine, guestwords.ToGuard], None],
        on_down: Callable[[HomeLine, PeerError], None],
    ) -> None:
        self.host = host
        self.lifeline = Lifeline(
            reactor,
            guest,
            leads=False,
            on_message=lambda message: on_word(self, _understand(message)),
            on_down=lambda reason: on_down(self, reason),
        )
        self._view = ViewServer(reactor, self.lifeline, owner) if serve_view else None

    def send(self, word: guestwords.ToKeeper) -> None:
        """Queue a message for the keeper; it survives cuts."""
        self.lifeline.send_message(guestwords.encode(word))

    def close(self) -> None:
        """End both."""
        if self._view is not None:
            self._view.close()
        self.lifeline.detach()


def _understand(message: bytes) -> guestwords.ToGuard:
    """:raises ProtocolError: it is no message of a keeper; the lifeline gives the transport up."""
    try:
        return guestwords.decode_for_guard(message)
    except MALFORMED as error:
        raise ProtocolError(f"a message that makes no sense: {error}") from None
