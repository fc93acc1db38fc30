"""The host that leads reports as the others do."""

import asyncio
from pathlib import Path

from agent.load_member import LoadMember
from agent.load_policy import Verdict
from agent.load_report import Report
from agent.peers import Hello, Peers
from migrate.config import Config, Host

REPORT = Report(machine="x86_64", verdict=Verdict.ACCEPTS, loads=(0, 0, 0), idle_seconds=50)


def test_the_central_daemons_own_host_is_heard_of_again_and_again(tmp_path: Path) -> None:
    """Else it would be down after `down_seconds`, for all who ask."""
    config = Config(hosts=(Host("node1", 1, "10.0.0.1"),), name="node1", report_seconds=0.01)

    async def run() -> None:
        reported = asyncio.Semaphore(0)

        def report() -> Report:
            reported.release()
            return REPORT

        async with Peers(Hello(1, "node1", "b")) as peers:
            member = LoadMember(
                lambda: config, peers, report, lambda uid, reason: None, tmp_path / "load"
            )
            member.start()
            async with asyncio.timeout(30):
                for _ in range(5):
                    await reported.acquire()
            member.close()

    asyncio.run(run())
