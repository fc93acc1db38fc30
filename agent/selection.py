"""Which host a process goes to if its user names none; the load database knows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from agent.load_service import Choice
from agent.this_host import ThisHost
from migrate.config import Config, Host
from migrate.errors import MigrateError, PeerError, UserError
from migrate.messages import Move
from migrate.mig_messages import Priority

log = logging.getLogger(__name__)

REACH_SECONDS = 2.0


def named_host(config: Config, request: Move, where_now: str) -> Host | None:
    """The host that a user names, if any.

    :param where_now: the name of the host where the process runs.
    :raises UserError: no such host, or it is there already.
    """
    if request.host:
        host = config.host_named(request.host)
    elif request.host_id:
        host = config.host_with_id(request.host_id)
    else:
        return None
    if host.name == where_now:
        raise UserError(f"pid {request.pid}", f"runs on {host.name} already", "name another host")
    return host


@asynccontextmanager
async def choose(
    here: ThisHost,
    uid: int,
    excluded: set[str],
    refused: list[PeerError],
    priority: Priority = Priority.NORMAL,
) -> AsyncIterator[Choice]:
    """An idle host that can be reached, in use until the block ends, or for as long as the guest.

    :param excluded: hosts not to try; those that cannot be reached are added.
    :param refused: what those that were tried have said.
    :raises PeerError: there is none; if one has refused, its reason.
    """
    if refused:
        log.info("%s", refused[-1])
    async with AsyncExitStack() as stack:
        while True:
            attempt = here.load.choose(uid, priority, frozenset(excluded))
            try:
                choice = await stack.enter_async_context(attempt)
            except PeerError:
                if refused:
                    raise refused[-1] from None
                raise
            try:
                async with asyncio.timeout(REACH_SECONDS):
                    await here.peers.control(choice.host).hello()
                break
            except (MigrateError, TimeoutError) as error:
                log.info("host %s: cannot be reached (%s)", choice.host.name, error)
                excluded.add(choice.host.name)
        yield choice
