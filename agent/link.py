"""Packets between migd and the guards and keepers on the same host, with descriptors.

Each of them listens on a socket in a directory that only root can enter, so that a restarted migd finds them.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from agent.fd_passing import close_all, receive_fds
from agent.terminal_mode import Waiting
from agent.wire import StreamState
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

MAX_PACKET = 1 << 17
MAX_FDS = 8

Name = Annotated[str, msgspec.Meta(max_length=256)]
TerminalKey = Annotated[str, msgspec.Meta(pattern=r"^tty\[[0-9a-f]{1,8}:[0-9a-f]{1,8}\]$")]


class TreeIds(msgspec.Struct, frozen=True):
    """The numbers of the root of a tree that the guest must find again."""

    pid: int
    ppid: int
    pgid: int
    sid: int


class Owner(msgspec.Struct, frozen=True):
    """Whose process it is."""

    name: Name
    uid: int
    gid: int
    groups: tuple[int, ...]


class Programs(msgspec.Struct, frozen=True):
    """What programs a host has (agent/programs.py). An empty identity equals none, not even another."""

    packages: Name = ""
    local_trees: tuple[Name, ...] = ()


class SystemFile(msgspec.Struct, frozen=True, array_like=True):
    """A file outside of the home view that the tree uses."""

    path: str
    size: int
    """in bytes; -1: it is a directory"""
    mtime_seconds: int


class OfferedTerminal(msgspec.Struct, frozen=True):
    """Home's terminal of a guest."""

    index: Annotated[int, msgspec.Meta(ge=0, le=4095)]
    """N of /dev/pts/N"""
    controlling: bool
    """it is the guest's controlling terminal, not only an open file"""


class GroupMember(msgspec.Struct, frozen=True, array_like=True):
    """A process of the tree that is in a group (agent/groups.py)."""

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    """as the tree counts"""
    group: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


class Offer(msgspec.Struct, frozen=True):
    """What a source tells a destination before anything freezes; and the keeper's instructions."""

    transaction: Name
    guest: Name
    home: Name
    source: Name
    owner: Owner
    ids: TreeIds
    epoch: int
    """number of hops, this one included"""
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)]
    machine: Name
    """architecture, as uname -m"""
    cpu_features: tuple[str, ...]
    criu_version: Name
    hostname: Name
    view: tuple[str, ...]
    """absolute directories that come from home"""
    command: str
    freeze_limit_seconds: float = 10.0
    cut_freeze_seconds: float = 20.0
    home_boot_id: Name = ""
    is_command: bool = False
    """the guest is started by its keeper, not restored from images"""
    priority: Annotated[int, msgspec.Meta(ge=0, le=2)] = 1
    """as migrate.mig_messages.Priority"""
    chosen: bool = False
    """the load database chose the destination: nobody named it"""
    programs: Programs = Programs()
    """home's"""
    files: tuple[SystemFile, ...] = ()
    """outside of the view: from home where the destination has them otherwise"""
    terminal: OfferedTerminal | None = None
    reason: Name = ""
    """why it moves, if nobody asked for this move: an eviction's"""
    groups: tuple[GroupMember, ...] = ()


class StartDeparture(msgspec.Struct, frozen=True, tag="depart"):
    """migd → guard or keeper: move the guest. Descriptors: bulk in, bulk out; for a new guest's guard,
    lifeline in and out follow."""

    offer: Offer
    destination: Name
    destination_boot_id: Name
    starttime_ticks: int
    host_pid: int
    ghost_limit_bytes: int


class StartCommand(msgspec.Struct, frozen=True, tag="command"):
    """migd → guard: stand at home for a command of `offer.ids.pid`. Descriptors: lifeline in and
    out, the client's socket, its `Command`, its stdin, stdout and stderr."""

    offer: Offer
    destination: Name
    destination_boot_id: Name
    starttime_ticks: int
    low: bool = False


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """migd → guard or keeper: a new transport. Descriptors: in, out (and the hold of an incoming one)."""

    purpose: Name
    host: Name
    transaction: Name = ""


class GuestLost(msgspec.Struct, frozen=True, tag="lost"):
    """migd → guard: the guest is not on `host` (it has said so, or was silent for too long)."""

    host: Name
    reason: str


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a departure is. `at_ms`: since the freeze, negative before it."""

    step: Name
    sent_bytes: int = 0
    at_ms: float = 0.0


class Departed(msgspec.Struct, frozen=True, tag="departed"):
    """guard or keeper → migd: the guest runs at the destination."""

    transaction: Name
    destination: Name
    frozen_ms: float
    sent_bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """guard or keeper → migd: it did not move; it runs on where it was unless `in_doubt`."""

    transaction: Name
    what: str
    reason: str
    remedy: str
    in_doubt: bool = False


class NeedLifeline(msgspec.Struct, frozen=True, tag="need-lifeline"):
    """guard → migd: connect me with the keeper on `host` (again)."""

    host: Name


class LifelineCut(msgspec.Struct, frozen=True, tag="cut"):
    """keeper → migd: home is silent. `back`: no longer."""

    back: bool = False


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """guard or keeper → migd: the guest has ended and everything is given back."""

    exit_code: int


class Running(msgspec.Struct, frozen=True, tag="running"):
    """keeper → migd: the guest has arrived, and runs."""


class EndGuest(msgspec.Struct, frozen=True, tag="end"):
    """migd → keeper: kill the guest and leave."""

    reason: str


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """migd → keeper: this host wants the guest gone for this reason: it stands still until it goes,
    or until a Hold without a reason. keeper → a migd that has just connected: so it is."""

    reason: Name


class StreamPipe(msgspec.Struct, frozen=True):
    """A pipe that leads out of the tree, and the stream that carries it."""

    stream: int
    key: str
    """CRIU's name of it in the images"""
    outgoing: bool
    """the guest writes to it"""
    size_bytes: int


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """What the source expects to send, told before it freezes anything: what can be made ready, is.

    Only a hint: what is Dumped may differ.
    """

    pipes: tuple[StreamPipe, ...]
    tids: tuple[int, ...]
    """of all threads of the tree, as its root counts"""


class TerminalState(msgspec.Struct, frozen=True):
    """The terminal of a guest that moves on; its mode and size are in the images."""

    keys: Annotated[tuple[TerminalKey, ...], msgspec.Meta(max_length=2)] = ()
    """CRIU's names of it in the images"""
    foreground: int = 0
    """the process group that has it; 0: home's has somebody else"""
    waiting: Waiting = b""
    """input that the guest has not read"""
    skip_to: int = 0
    """keys before this offset of their stream went back to home"""
    reading: bool = False
    """keys come on the stream"""


class Dumped(msgspec.Struct, frozen=True, tag="dumped"):
    """source → destination: the images are complete."""

    pipes: tuple[StreamPipe, ...]
    files: tuple[int, ...]
    """descriptors 0, 1, 2 of the root that are regular files: home shares their offset"""
    streams: tuple[StreamState, ...] = ()
    """as the keeper that hands the guest on leaves them"""
    terminal: TerminalState | None = None


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    """migd → guard or keeper in doubt: what the destination has recorded."""

    resumed: bool


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """source → destination: journalled; let it run."""


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """destination → source: capsule and view stand."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """destination → source: restored, and frozen."""


class Resumed(msgspec.Struct, frozen=True, tag="resumed"):
    """destination → source: journalled; it runs."""


class Aborted(msgspec.Struct, frozen=True, tag="aborted"):
    """destination → source: journalled; it will never run here."""

    what: str
    reason: str
    remedy: str = ""


ToAgent: TypeAlias = StartDeparture | StartCommand | Attach | EndGuest | Verdict | GuestLost | Hold
FromAgent: TypeAlias = (
    Progress | Departed | Failed | NeedLifeline | Ended | LifelineCut | Hold | Running
)


TransactionMessage: TypeAlias = Planned | Dumped | Commit | Prepared | Ready | Resumed | Aborted
Packet: TypeAlias = ToAgent | FromAgent

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Packet).decode


class Link:
    """One connection, packet by packet. Sending never blocks for long: packets are small and few."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, packet: Packet, fds: tuple[int, ...] = ()) -> bool:
        """False if the other side is gone."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.socket.sendmsg([_encode(packet)], rights, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[Packet, list[int]] | None:
        """The next packet with its descriptors; None at the end, or if it is none. Raises BlockingIOError."""
        try:
            data, fds, cut_short = receive_fds(self.socket, MAX_PACKET, MAX_FDS)
        except BlockingIOError:
            raise
        except OSError:
            return None
        packet = None
        if data and not cut_short:
            with contextlib.suppress(*MALFORMED):
                packet = _decode(data)
        if packet is None:
            close_all(fds)
            if data:
                log.warning("a packet that makes no sense: the connection is dropped")
            return None
        return packet, fds

    def close(self) -> None:
        self.socket.close()


def listen(path: Path) -> socket.socket:
    """A listening packet socket below a root-only directory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path.unlink(missing_ok=True)
    sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(4)
    sock.setblocking(False)
    return sock


def connect(path: Path) -> Link:
    """Connect to a guard or keeper. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return Link(sock)


def take_stdin() -> socket.socket:
    """The socket that migd gave this process as stdin; /dev/null takes its place."""
    sock = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    return sock


def in_doubt(start: StartDeparture | StartCommand, doubt: str) -> Failed:
    """What a client is told while only the destination's record can tell what happened."""
    return Failed(
        start.offer.transaction,
        f"host {start.destination}",
        f"committed, but it has not confirmed ({doubt}); the process waits frozen",
        "it is settled when the host answers, or by `migctl recover`",
        in_doubt=True,
    )
