"""What a move ends in, by the word of the guard or keeper that drives it."""

import asyncio

import pytest

from agent.handover import _follow, tell_nobody
from agent.link import Departed, Failed, Packet, Progress
from migrate.errors import HostError, PeerError


def follow(*said: Packet | None) -> Departed:
    async def run() -> Departed:
        queue: asyncio.Queue[Packet | None] = asyncio.Queue()
        for packet in said:
            queue.put_nowait(packet)
        return await _follow(queue, "t1", tell_nobody)

    return asyncio.run(run())


def test_progress_is_followed_to_the_end() -> None:
    departed = Departed("t1", "node2", 48.0, 7)
    assert follow(Progress("frozen"), departed) == departed


def test_a_refusal_is_the_peers_so_another_host_may_be_tried() -> None:
    with pytest.raises(PeerError, match="host node2: is full"):
        follow(Failed("t1", "host node2", "is full", ""))


def test_in_doubt_no_other_host_is_tried() -> None:
    """Every loop over hosts goes on after a PeerError; a process in doubt may run at the first."""
    with pytest.raises(HostError) as error:
        follow(Failed("t1", "host node2", "has not confirmed", "", in_doubt=True))
    assert not isinstance(error.value, PeerError)


def test_the_end_of_another_move_is_not_this_ones() -> None:
    departed = Departed("t1", "node2", 48.0, 7)
    assert follow(Departed("t0", "node3", 1.0, 1), Failed("t0", "a", "b", ""), departed) == departed


def test_a_driver_that_was_killed_is_this_hosts_failure() -> None:
    with pytest.raises(HostError, match="was killed"):
        follow(None)
