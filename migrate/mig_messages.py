"""What the Mig library and migd say to each other on load.sock, and what they say about hosts.

One frame a message (migrate.framing), in msgpack. Requests are answered in the order they came;
events come in between, whenever there is something to tell.
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

PROTOCOL = 1
MAX_FRAME_BYTES = 1 << 20

HostName = Annotated[str, msgspec.Meta(max_length=64)]
Word = Annotated[str, msgspec.Meta(max_length=256)]
HostNames = Annotated[tuple[HostName, ...], msgspec.Meta(max_length=4096)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Uid = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class HostState(enum.StrEnum):
    """Of a host, as the load database sees it."""

    ACTIVE = "ACTIVE"
    """somebody works at it, or its load is too high: no guests"""
    IDLE = "IDLE"
    """takes guests, and has none"""
    PART_USED = "PART_USED"
    """has guests, and takes more of NORMAL priority"""
    FULL = "FULL"
    """takes guests, but has no slot left for one of NORMAL priority"""
    REFUSES = "REFUSES"
    """an administrator wants no guests there"""
    DOWN = "DOWN"
    """not heard of for too long; all but `last_up` says nothing"""


class Priority(enum.IntEnum):
    """Of guests. A host with guests of one priority still takes those of a higher one."""

    LOW = 0
    """long-running background work"""
    NORMAL = 1
    """compilations and the like"""
    HIGH = 2


class GuestCount(msgspec.Struct, frozen=True):
    """How many guests of one user, home and priority run on a host."""

    uid: Uid
    user: Word
    home: HostName
    priority: Priority
    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class HostInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a host (Sprite's Mig_Info and its Mig_LoadVector)."""

    name: HostName
    id: int
    machine: Word = ""
    """architecture, as uname -m"""
    state: HostState = HostState.DOWN
    accepts: bool = False
    """whether it is willing to take guests now, slots apart"""
    reason: Word = ""
    """why it is ACTIVE or REFUSES, for people"""
    loads: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """load averages of the last 1, 5 and 15 minutes"""
    cpu_percent: float = 0.0
    """weighted average of the processors' utilisation, 0 to 100"""
    ready_queue: float = 0.0
    """weighted average of processes that run or wait for a processor"""
    processors: int = 0
    idle_seconds: float = 0.0
    """since the last input of somebody directly logged in"""
    up_seconds: float = 0.0
    last_up: float = 0.0
    """when it was last heard of: seconds since the epoch by the central daemon's clock; 0: never"""
    slots: int = 0
    """guests of one priority that it takes at once"""
    claims: int = 0
    """slots promised to clients"""
    guests: tuple[GuestCount, ...] = ()


class Held(msgspec.Struct, frozen=True):
    """A claim: the right to use a slot of a host."""

    host: HostName
    priority: Priority
    agent: bool = False
    """it ends when the host sees the guest end, not with the client (MIG_PROC_AGENT)"""


# ---------------------------------------------------------------------- requests


class Open(msgspec.Struct, frozen=True, tag="open"):
    """The first message of a connection. `held`: claims of an earlier connection, wanted back."""

    protocol: int = PROTOCOL
    held: Annotated[tuple[Held, ...], msgspec.Meta(max_length=4096)] = ()


class AskLocal(msgspec.Struct, frozen=True, tag="local"):
    """This host's own record; answered without the central daemon."""


class AskHost(msgspec.Struct, frozen=True, tag="host"):
    """The record of a host, by name or, if that is empty, by number."""

    name: HostName = ""
    id: int = 0


class AskAll(msgspec.Struct, frozen=True, tag="all"):
    """The records of all hosts."""


class RequestHosts(msgspec.Struct, frozen=True, tag="request"):
    """Claim up to `count` idle hosts."""

    count: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    priority: Priority = Priority.NORMAL
    agent: bool = False
    notify: bool = False
    """send MoreHosts if fewer are granted, once there are more"""
    exclude: HostNames = ()
    """hosts of no use to the client, such as those that have just refused"""
    machine: Word = ""
    """only hosts of this architecture; empty: that of the client's host"""


class Confirm(msgspec.Struct, frozen=True, tag="confirm"):
    """Is this host, which I hold, still available?"""

    host: HostName


class ReturnHosts(msgspec.Struct, frozen=True, tag="return"):
    """Give back one claim on each of these (all claims if `all_of_them`)."""

    hosts: HostNames = ()
    all_of_them: bool = False


class DeleteHost(msgspec.Struct, frozen=True, tag="delete"):
    """Forget a host that is down."""

    host: HostName


class Evict(msgspec.Struct, frozen=True, tag="evict"):
    """Send the guests of this host home."""


class AskStats(msgspec.Struct, frozen=True, tag="stats"):
    """What has the central daemon done so far?"""


class SetLimits(msgspec.Struct, frozen=True, tag="set"):
    """Other thresholds for this host, until its migd ends. None: as it is."""

    idle_seconds: Amount | None = None
    load_accept: tuple[Amount, Amount, Amount] | None = None
    load_stop: tuple[Amount, Amount, Amount] | None = None
    guest_slots: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None


class Block(msgspec.Struct, frozen=True, tag="block"):
    """Take no guests here, until Bring; also over a restart."""

    reason: Word = ""


class Bring(msgspec.Struct, frozen=True, tag="bring"):
    """Undo Block and Expel."""


class Expel(msgspec.Struct, frozen=True, tag="expel"):
    """Block, and send the guests that are here home."""

    reason: Word = ""


class AwaitGone(msgspec.Struct, frozen=True, tag="await-gone"):
    """Are there guests here? Answered with their number: at once if it is 0, else as soon as it is,
    or after some seconds."""


Request = (
    Open
    | AskLocal
    | AskHost
    | AskAll
    | RequestHosts
    | Confirm
    | ReturnHosts
    | DeleteHost
    | Evict
    | AskStats
    | SetLimits
    | Block
    | Bring
    | Expel
    | AwaitGone
)

# ---------------------------------------------------------------------- replies


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """To Open: where this is, and which of the claims could not be had again."""

    host: HostName
    lost: tuple[Held, ...] = ()


class HostIs(msgspec.Struct, frozen=True, tag="host-is"):
    """To AskLocal and AskHost."""

    info: HostInfo


class HostsAre(msgspec.Struct, frozen=True, tag="hosts-are"):
    """To AskAll, by host number."""

    hosts: tuple[HostInfo, ...]


class Granted(msgspec.Struct, frozen=True, tag="granted"):
    """To RequestHosts: the hosts that are yours now; none is an answer, too."""

    hosts: HostNames


class Confirmed(msgspec.Struct, frozen=True, tag="confirmed"):
    """To Confirm."""

    available: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    """To what has no other answer. `count`: claims given back, or guests sent home."""

    count: int = 0


class Stats(msgspec.Struct, frozen=True, tag="stats-are"):
    """To AskStats: of the central daemon, since it took over."""

    central: HostName = ""
    term: int = 0
    """counts the changes of central daemon"""
    up_seconds: float = 0.0
    hosts: int = 0
    available: int = 0
    claims: int = 0
    clients: int = 0
    requests: int = 0
    granted: int = 0
    denied: int = 0
    """hosts asked for and not to be had"""
    returned: int = 0
    lost: int = 0
    """claims that ended because the host was no longer available"""
    asked_back: int = 0
    """claims that a user with many was asked to give up"""
    reports: int = 0
    idle_percent: float = 0.0
    """hosts available, of those that are up"""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """It could not be done. `blame`: the name of a class of migrate.errors."""

    blame: Word
    what: Word
    reason: str
    remedy: str = ""


# ---------------------------------------------------------------------- events


class HostLost(msgspec.Struct, frozen=True, tag="lost"):
    """A host that you held is yours no longer."""

    host: HostName
    reason: Word = ""


class MoreHosts(msgspec.Struct, frozen=True, tag="more"):
    """You asked for more hosts than there were; now it is worth asking again."""


class GiveBack(msgspec.Struct, frozen=True, tag="give-back"):
    """Somebody else has no host at all: return this one, or it is taken from you."""

    host: HostName
    seconds: float


Event = HostLost | MoreHosts | GiveBack
EVENTS = (HostLost, MoreHosts, GiveBack)
Reply = Opened | HostIs | HostsAre | Granted | Confirmed | Done | Stats | Failure
Answer = Reply | Event

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
