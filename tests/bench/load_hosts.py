"""Simulated hosts and clients of a central daemon, over its real sockets and with real messages.

    python load_hosts.py DIRECTORY HOSTS REPORT_SECONDS

Each host is what agent/bridge.py makes of an ssh connection: it hands a socket to peer.sock, then
says Hello, attaches itself, reports, listens, and pings as agent/peer_control.py does. It says
"ready" when all have attached, and runs until its stdin ends.
"""

import asyncio
import os
import random
import resource
import socket
import sys
from pathlib import Path

from agent import load_messages as words
from agent.control_frame import ControlFrame, Kind, decode_control, encode_control
from agent.fdstream import FdStream
from agent.load_policy import Verdict
from agent.load_report import Report
from agent.peer_hello import PROTOCOL, Hello, encode_word
from agent.peer_identity import DEFAULT_PATIENCE
from migrate.framing import encode_frame


def report(idle_seconds: float) -> Report:
    return Report(
        machine="x86_64",
        verdict=Verdict.ACCEPTS,
        loads=(0.1, 0.1, 0.1),
        idle_seconds=idle_seconds,
        slots=1,
    )


def hand_over(path: Path, name: str) -> tuple[socket.socket, socket.socket]:
    """As the bridge does. :return: sshd's end of the connection, and the bridge's hold."""
    ours, theirs = socket.socketpair()
    hold = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    hold.connect(str(path))
    with theirs:
        socket.send_fds(hold, [name.encode()], [theirs.fileno(), theirs.fileno()])
    return ours, hold


async def live(path: Path, number: int, attached: asyncio.Semaphore, every: float) -> None:
    """A host's life."""
    name = f"host{number}"
    sock, hold = hand_over(path, name)
    with hold, FdStream(os.dup(sock.fileno()), sock.fileno()) as stream:
        sock.detach()
        await stream.write_frame(encode_word(Hello(PROTOCOL, name, "boot")))
        await stream.read_frame()
        asked = 0

        async def say(kind: Kind, payload: bytes = b"") -> None:
            nonlocal asked
            asked += 1
            await stream.write(encode_frame(encode_control(ControlFrame(kind, asked, payload))))

        await say(Kind.REQUEST, words.encode(words.AttachHost(report(float(number)))))
        await stream.read_frame()
        attached.release()
        await say(Kind.REQUEST, words.encode(words.Listen()))
        listening = asked

        async def hear() -> None:
            nonlocal listening
            while (data := await stream.read_frame()) is not None:
                frame = decode_control(data)
                if frame.kind is Kind.ANSWER and frame.number == listening:
                    await say(Kind.REQUEST, words.encode(words.Listen()))
                    listening = asked

        async def speak() -> None:
            await asyncio.sleep(random.uniform(0, every))
            while True:
                await say(Kind.REQUEST, words.encode(words.SendReport(report(float(number)))))
                await asyncio.sleep(every)

        async def ping() -> None:
            await asyncio.sleep(random.uniform(0, DEFAULT_PATIENCE.ping_after_seconds))
            while True:
                await say(Kind.PING)
                await asyncio.sleep(DEFAULT_PATIENCE.ping_after_seconds)

        await asyncio.gather(hear(), speak(), ping())


async def run(directory: Path, count: int, every: float) -> None:
    attached = asyncio.Semaphore(0)
    tasks = []
    for number in range(2, count + 2):
        work = live(directory / "peer.sock", number, attached, every)
        tasks.append(asyncio.create_task(work))
        await attached.acquire()
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for task in tasks:
        task.cancel()


def main() -> None:
    """Entry point."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))


if __name__ == "__main__":
    main()
