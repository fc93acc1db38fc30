"""migd, the daemon on every host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from agent.activation import inherited_socket
from agent.broker import Broker
from agent.clients import ClientServer
from agent.command_server import CommandServer
from agent.daemon import Detached, parse_options, raise_open_files, set_up_logging
from agent.load_clients import LoadClients
from agent.logins import LoginDoor
from agent.peers import Patience, Peers, PeerServer, own_hello
from criu_hooks.program import criu_path
from migrate import paths
from migrate.config import Config, load_config
from migrate.errors import HostError, MigrateError

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); does nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send(state.encode())


def probe_criu() -> str:
    """CRIU's version.

    Also has CRIU probe the kernel as root, once: it keeps what it finds in /run/criu.kdat, and
    later, under a user's ids, it could not.
    """
    path = criu_path()
    subprocess.run([path, "check"], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = text.split()[1] if len(text.split()) > 1 else ""
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (4, 2):
        raise HostError("criu", f"is version {version or 'unknown'}", "install 4.2 or newer")
    return version


async def serve(config: Config, criu_version: str, ready: Callable[[], None]) -> None:
    """Run until SIGTERM. :param ready: called when clients and peers can come."""
    user = pwd.getpwnam(paths.PEER_USER)
    own = own_hello(config.name)
    patience = Patience(
        connect_seconds=config.connect_seconds, answer_seconds=config.peer_answer_seconds
    )
    async with Peers(own, patience=patience) as peers:
        broker = Broker(config, peers, criu_version)
        server = PeerServer(
            own,
            broker.questions.is_peer,
            broker.questions.answer,
            broker.questions.incoming,
            serve_at_once=broker.questions.answer_at_once,
            control_ended=broker.load.member.peer_gone,
            group_id=user.pw_gid,
            allowed_uids=frozenset({0, user.pw_uid}),
        )
        clients = ClientServer(broker)
        commands = CommandServer(broker.run_command)
        load_clients = LoadClients(broker.load, inherited=inherited_socket("load"))
        logins = LoginDoor(lambda: broker.config, broker.load.owner_came)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, broker.reload)
        try:
            server.start()
            await broker.start()
            await clients.start()
            commands.start()
            load_clients.start()
            logins.start()
            await broker.groups.mounted()
            ready()
            log.info("migd on %s is ready (CRIU %s)", config.name, criu_version)
            await stop.wait()
        finally:
            notify("STOPPING=1")
            clients.close()
            commands.close()
            load_clients.close()
            logins.close()
            await server.aclose()
            broker.close()


def main() -> None:
    """Entry point of `migd`."""
    options = parse_options(sys.argv[1:])
    if os.geteuid() != 0:
        sys.exit("migd: must run as root")
    os.umask(0o077)
    try:
        config = load_config()
        set_up_logging(options, config.name)
        raise_open_files()
        paths.RUN_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        paths.RUN_DIR.chmod(0o755)
        paths.STATE_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        version = probe_criu()
        # A service manager that is to be told of readiness minds the process itself.
        if options.foreground or "NOTIFY_SOCKET" in os.environ:
            asyncio.run(serve(config, version, lambda: notify("READY=1")))
        else:
            detached = Detached()
            asyncio.run(serve(config, version, detached.ready))
    except MigrateError as error:
        sys.exit(f"migd: {error}")
    except OSError as error:
        sys.exit(f"migd: {error.filename or 'cannot start'}: {error.strerror}")
    except KeyError:
        sys.exit(f"migd: user {paths.PEER_USER}: does not exist; run `migctl setup`")


if __name__ == "__main__":
    main()
