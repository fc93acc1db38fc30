"""A central daemon of its own for the benchmark: migd's load service, with its two real sockets.

    python load_central.py DIRECTORY HOSTS

The sockets are DIRECTORY/peer.sock (what agent/bridge.py connects to) and DIRECTORY/load.sock. It
says "ready" and runs until its stdin ends.
"""

import asyncio
import resource
import sys
from pathlib import Path

import msgspec

from agent.load_clients import LoadClients
from agent.load_messages import LoadQuestion
from agent.load_service import LoadService
from agent.peer_hello import PROTOCOL, Hello
from agent.peers import IncomingConnection, Peers, PeerServer
from migrate.config import Config, Host


def config_of(count: int) -> Config:
    """A cluster whose first host is the only candidate; its numbers count from 1."""
    hosts = tuple(Host(f"host{n}", n, f"192.0.2.{n % 250}", n) for n in range(1, count + 2))
    return Config(hosts=hosts, name="host1", central_candidates=("host1",), accept_guests=False)


async def serve(directory: Path, count: int) -> None:
    config = config_of(count)
    own = Hello(PROTOCOL, config.name, "boot")
    decode = msgspec.msgpack.Decoder(LoadQuestion).decode
    async with Peers(own) as peers:
        service = LoadService(
            lambda: config,
            peers,
            lambda: (),
            lambda uid, reason: 0,
            state_dir=directory,
            run_dir=directory,
        )

        async def answer(peer: str, payload: bytes) -> bytes:
            return await service.answer(peer, decode(payload))

        async def receive(connection: IncomingConnection) -> None:
            connection.close()

        names = {host.name for host in config.hosts}
        server = PeerServer(
            own,
            names.__contains__,
            answer,
            receive,
            serve_at_once=lambda peer, payload: service.answer_now(peer, decode(payload)),
            control_ended=service.member.peer_gone,
            path=directory / "peer.sock",
        )
        clients = LoadClients(service, directory / "load.sock")
        server.start()
        await service.start()
        clients.start()
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        clients.close()
        await server.aclose()
        service.close()


def main() -> None:
    """Entry point."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
