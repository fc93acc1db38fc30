"""The keeper: one root process per guest where it runs, ``python -m agent.keeper`` with migd's link as stdin.

Two processes: the outer one owns what must be given back (mounts, cgroups, directories) and waits; the inner
one lives in the guest's pid namespace under the pid of the original's parent, so that the guest's getppid()
stays right, and is the guest's parent. If the inner one dies the kernel kills all in its pid namespace with
the namespace's init, which dies with the outer one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import msgspec

from agent import own_directory, spawning, syscalls
from agent.cgroups import Cgroup, dissolve, guest_path, leave_cgroup
from agent.guest_host import GuestHost
from agent.home_view import HomeView
from agent.link import Link, Offer, listen, take_stdin
from agent.session import fork_parent
from agent.syscalls import CLONE_NEWPID, MS_NODEV, MS_NOEXEC, MS_NOSUID
from agent.terminal import TERMINAL_SIGNALS, FarTerminal, mounted
from criu_hooks.calls import CriuCall
from migrate import paths
from migrate.errors import HostError

log = logging.getLogger(__name__)


def serve(offer: Offer, link: Link, local: bool) -> None:
    """Host one guest until it has ended or gone on.

    :param local: the guest is at home here: its files are this host's own.
    """
    directory = paths.GUESTS_DIR / f"keeper-{offer.guest}"
    directory.mkdir(mode=0o700, parents=True)
    images = directory / "images"
    (directory / "offer").write_bytes(msgspec.msgpack.encode(offer))
    view: HomeView | None = None
    try:
        cgroup = Cgroup(guest_path("keeper", offer.guest, "own"))
        cgroup.create()
        cgroup.add(os.getpid())
        images.mkdir(mode=0o700)
        (directory / "root").mkdir(mode=0o700)
        size = 2 * offer.memory_bytes + (64 << 20)  # all may change after it was sent ahead
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        syscalls.mount("tmpfs", images, "tmpfs", flags, f"mode=0700,size={size}")
        if not local:
            view = HomeView(directory / "view", offer.owner)
        # The worker is made out here: inside it would take a pid that the guest may need.
        worker = (
            contextlib.nullcontext()
            if offer.is_command
            else CriuCall(spawning.connect(spawning.WORKERS))
        )
        with (
            worker as call,
            listen(directory / "keeper.sock") as server,
            mounted(directory / "pts") as devpts,
        ):
            _run_inside(offer, link, server, view, images, call, devpts)
    finally:
        tree = Cgroup(guest_path("keeper", offer.guest, "tree"))
        tree.kill()
        if view is not None:
            view.close()
        leave_cgroup()
        dissolve("keeper", offer.guest)
        own_directory.remove(directory)


def _run_inside(
    offer: Offer,
    link: Link,
    server: socket.socket,
    view: HomeView | None,
    images: Path,
    call: CriuCall | None,
    devpts: Path,
) -> None:
    terminal: FarTerminal | None = None
    if offer.terminal is not None:
        terminal = FarTerminal(devpts, offer.terminal.index, offer.owner.uid)
    syscalls.unshare(CLONE_NEWPID)
    init = 0
    if offer.ids.ppid > 1:
        init = os.fork()
        if init == 0:
            _become_init()
    inner = fork_parent(offer.ids, partial(_lead, offer, terminal))
    if inner == 0:
        status = 1
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            GuestHost(offer, link, server, view, images, call, devpts, terminal).run()
            status = 0
        except Exception:
            log.exception("%s: keeper failed", offer.guest)
        finally:
            os._exit(status)
    link.close()
    if terminal is not None:
        terminal.close()
    if view is not None:
        # The inner process alone holds the other end now: when it ends, so does sshfs, and nobody
        # is left waiting for a file of home's. Only then can the pid namespace come to its end.
        view.socket.close()
    try:
        _, status = os.waitpid(inner, 0)
        if status:
            log.warning("%s: inner keeper: %s", offer.guest, os.waitstatus_to_exitcode(status))
    finally:
        if view is not None:
            view.close()
        if init:
            os.kill(init, signal.SIGKILL)
            os.waitpid(init, 0)


def _lead(offer: Offer, terminal: FarTerminal | None) -> None:
    """In the leader of the guest's session."""
    if terminal is not None and offer.terminal is not None and offer.terminal.controlling:
        terminal.lead()


def _become_init() -> None:
    """Pid 1 of the capsule: a program that does nothing. Ignoring SIGCHLD makes the kernel reap orphans."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.execv("/bin/sleep", ["sleep", "infinity"])
    finally:
        os._exit(127)


def main() -> None:
    """Entry point of the keeper process: argv is the guest's id; the first packet is the offer."""
    logging.basicConfig(level=logging.INFO, format="keeper %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    sock = take_stdin()
    offer = msgspec.msgpack.decode(sock.recv(1 << 17), type=Offer)
    try:
        serve(offer, Link(sock), local=sys.argv[2] == "local")
    except HostError as error:
        log.error("%s: %s", offer.guest, error)


if __name__ == "__main__":
    main()
