"""A process that has imported what others need, and forks one of them for each connection.

To start Python and import an agent takes 150 ms, pycriu 90 more; to fork 2 ms. There are two kinds,
``python -m agent.forkserver KIND`` with the listening socket as stdin:

    agents   a guard or keeper: its Birth comes on the connection, with its end of migd's link
    workers  one that speaks CRIU's RPC (criu_hooks/worker.py), for the one who connects

It ends when nobody has connected for a while, or with migd; who was forked lives on. The other side is
agent/spawning.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent import syscalls
from agent.fd_passing import close_all, receive_fds
from agent.spawning import WORKERS, Birth
from migrate.framing import MALFORMED

IDLE_SECONDS = 600.0
MAX_BIRTH_BYTES = 4096


def main() -> None:
    """Entry point of the server."""
    kind = sys.argv[1]
    # Before the imports: a migd that ends at once leaves nobody behind.
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    serve = _worker if kind == WORKERS else _agent
    _import(kind)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as listener:
        listener.setblocking(False)
        gc.collect()
        gc.freeze()  # what is never looked at stays shared
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while poll.poll(IDLE_SECONDS * 1000):
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    if os.fork() == 0:
                        listener.close()
                        _be_born(connection, serve)


def _import(kind: str) -> None:
    if kind == WORKERS:
        from criu_hooks import worker  # noqa: F401
    else:
        from agent import guard, keeper  # noqa: F401


def _be_born(connection: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 0)
        os.setsid()
        connection.setblocking(True)
        serve(connection)
        status = 0
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        status = leaving.code if isinstance(leaving.code, int) else 1
    except MALFORMED as error:
        print(f"forkserver: a request that makes no sense: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(status)


def _worker(connection: socket.socket) -> None:
    from criu_hooks import worker

    _take_title("criu_hooks.worker")
    worker.serve(connection)


def _agent(connection: socket.socket) -> None:
    from agent import guard, keeper

    with connection:
        data, fds, _ = receive_fds(connection, MAX_BIRTH_BYTES, 1)
        birth = msgspec.msgpack.decode(data, type=Birth)
        if not fds:
            sys.exit("forkserver: a request without its descriptor")
        os.dup2(fds[0], 0)
        close_all(fds)
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(connection, [str(os.getpid()).encode()], [pidfd])
        os.close(pidfd)
    sys.argv = [f"agent.{birth.role}", *birth.words]
    _take_title(f"agent.{birth.role} {' '.join(birth.words)}")
    (keeper if birth.role == "keeper" else guard).main()


def _take_title(words: str) -> None:
    """Have ps and the like show what this process is: write over the arguments (proc(5), cmdline)."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])
    title = f"{sys.executable} -I -m {words}".encode()[: end - start - 1]
    ctypes.memmove(start, title.replace(b" ", b"\0").ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
