"""Which host a process goes to if its user names none; the load database will stand behind it."""

from __future__ import annotations

import asyncio

from agent import peer_messages
from agent.peers import Peers
from migrate.config import Config, Host
from migrate.errors import MigrateError, PeerError, UserError
from migrate.messages import Move

ASK_SECONDS = 2.0


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


async def choose_host(config: Config, peers: Peers, excluded: frozenset[str]) -> Host:
    """The reachable host with the lowest load that takes guests.

    :raises PeerError: there is none.
    """
    candidates = [host for host in config.peers if host.name not in excluded]
    loads = await asyncio.gather(*(_load(peers, host) for host in candidates))
    known = [
        (load.per_cpu, host.id, host) for load, host in zip(loads, candidates, strict=True) if load
    ]
    if not known:
        raise PeerError(
            "cluster",
            "no other host can be reached that takes guests",
            "name one with -h, or try later",
        )
    return min(known)[2]


async def _load(peers: Peers, host: Host) -> peer_messages.Load | None:
    question = peer_messages.encode(peer_messages.AskLoad())
    try:
        data = await peers.control(host).request(question, ASK_SECONDS)
    except MigrateError:
        return None
    answer = peer_messages.decode_answer(data)
    return answer if isinstance(answer, peer_messages.Load) and answer.accepts else None
