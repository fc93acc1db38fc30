"""The control messages between a guard and a keeper, on stream 0 of their lifeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from agent.terminal_mode import Mode, Size, Waiting
from agent.wire import Stream


class Signal(msgspec.Struct, frozen=True, tag="signal"):
    """guard → keeper: a signal that reached the deputy, for the root of the guest.

    `group`: for the rest of its process group as well; at home that was one group with the deputy.
    """

    number: int
    value: int | None = None
    group: bool = False


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """guard → keeper: the deputy was killed; so is the guest."""


class TakeTerminal(msgspec.Struct, frozen=True, tag="take-terminal"):
    """guard → keeper: home's terminal is the guest's from now on; its keys come on TERMINAL_STREAM."""

    size: Size
    mode: Mode | None = None
    """None: the guest's stays as it is"""
    waiting: Waiting = b""
    """input that waited in home's terminal"""
    skip_to: int = 0
    """keys before this offset of the stream went back to home's terminal"""
    in_front: bool = False
    """the group of the guest's root comes into the foreground"""


class YieldTerminal(msgspec.Struct, frozen=True, tag="yield-terminal"):
    """guard → keeper: home's terminal is somebody else's now."""


class ResizeTerminal(msgspec.Struct, frozen=True, tag="resize-terminal"):
    """guard → keeper: home's terminal has another size."""

    size: Size


class HangUp(msgspec.Struct, frozen=True, tag="hang-up"):
    """guard → keeper: home's terminal is no more."""


class TerminalLeft(msgspec.Struct, frozen=True):
    """How a guest that stopped or ended leaves its terminal."""

    mode: Mode | None = None
    waiting: Waiting = b""
    """input that it has not read"""


class StreamPosition(msgspec.Struct, frozen=True, array_like=True):
    """What one end has of a stream that moves on to another keeper."""

    stream: int
    received: int
    acknowledged: int
    refused: bool
    """it wants no more of it"""

    @classmethod
    def of(cls, stream: Stream) -> StreamPosition:
        """Of this end."""
        receiver = stream.receiver
        return cls(stream.number, receiver.position, receiver.acknowledged, receiver.reset)

    def apply(self, stream: Stream) -> None:
        """To the other end: it goes on sending after what was received.

        :raises ProtocolError: that contradicts what this end knows.
        """
        if self.refused:
            stream.sender.accept_reset(min(self.acknowledged, stream.sender.sent))
        else:
            stream.sender.rewind(self.received)
            stream.sender.accept_ack(self.acknowledged)


class Started(msgspec.Struct, frozen=True, tag="started"):
    """keeper → guard: the guest runs here from this epoch on.

    `positions`: of each stream that came along from the last keeper, what has been received.
    """

    epoch: int
    positions: tuple[StreamPosition, ...] = ()


class GoOn(msgspec.Struct, frozen=True, tag="go-on"):
    """guard → keeper: the answer to Started, with what has been received at home."""

    positions: tuple[StreamPosition, ...]


class CommandPipe(msgspec.Struct, frozen=True, array_like=True):
    """A stream that is one or more of a command's stdio descriptors."""

    stream: int
    outgoing: bool
    """the command writes to it"""
    numbers: tuple[Annotated[int, msgspec.Meta(ge=0, le=2)], ...]


class CommandDevice(msgspec.Struct, frozen=True, array_like=True):
    """A stdio descriptor that is a device which every host has."""

    number: Annotated[int, msgspec.Meta(ge=0, le=2)]
    path: Literal["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]
    flags: int
    """of open(2)"""


class Limit(msgspec.Struct, frozen=True, array_like=True):
    """A resource limit, as setrlimit(2) has it."""

    resource: int
    soft: int
    hard: int


class CommandTerminal(msgspec.Struct, frozen=True, array_like=True):
    """The controlling terminal of a command, as home's is."""

    size: Size
    mode: Mode
    numbers: tuple[Annotated[int, msgspec.Meta(ge=0, le=2)], ...]
    """of stdio, which are this terminal"""
    in_front: bool
    """the command's group is in the foreground"""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """guard → keeper: execute the command, which COMMAND_STREAM has brought."""

    host: str
    """where it runs, for MIGRATE_HOST"""
    cwd: str
    pipes: tuple[CommandPipe, ...]
    devices: tuple[CommandDevice, ...]
    limits: tuple[Limit, ...]
    umask: int
    nice: int
    low: bool
    terminal: CommandTerminal | None = None


class Prepared(msgspec.Struct, frozen=True, tag="prepared"):
    """keeper → guard: the capsule stands, the command may begin."""


class NotStarted(msgspec.Struct, frozen=True, tag="not-started"):
    """keeper → guard: the command was not executed, and never will be. `status`: 125, 126 or 127."""

    status: Annotated[int, msgspec.Meta(ge=125, le=127)]
    what: str
    reason: str
    remedy: str = ""


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """keeper → guard: the root of the guest was stopped by a signal."""

    number: int
    offsets: tuple[tuple[int, int], ...] = ()
    terminal: TerminalLeft | None = None


class Continued(msgspec.Struct, frozen=True, tag="continued"):
    """keeper → guard: it runs again."""


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """keeper → guard: it ended, 0 to 255 or minus the signal; all its output was sent before."""

    exit_code: int
    offsets: tuple[tuple[int, int], ...] = ()
    """descriptor and position of each file that home shares"""
    rest: bool = False
    """it has left background processes, which live on; `Emptied` comes when they have ended"""
    terminal: TerminalLeft | None = None


class Emptied(msgspec.Struct, frozen=True, tag="emptied"):
    """keeper → guard: the last process that an ended guest had left has ended, too."""


class Moving(msgspec.Struct, frozen=True, tag="moving"):
    """keeper → guard: how far a hop is; as agent.link.Progress."""

    step: Annotated[str, msgspec.Meta(pattern=r"^[a-z -]{1,40}$")]
    sent_bytes: Annotated[int, msgspec.Meta(ge=0)]
    at_ms: float


ToKeeper = Signal | Kill | GoOn | Begin | TakeTerminal | YieldTerminal | ResizeTerminal | HangUp
ToGuard = Started | Stopped | Continued | Ended | Emptied | Prepared | NotStarted | Moving

encode = msgspec.msgpack.Encoder().encode
decode_for_keeper: Callable[[bytes], ToKeeper] = msgspec.msgpack.Decoder(ToKeeper).decode
decode_for_guard: Callable[[bytes], ToGuard] = msgspec.msgpack.Decoder(ToGuard).decode

VIEW_STREAM = 1
COMMAND_STREAM = 2
"""a msgpack `migrate.messages.Command`, once, to the keeper of a command"""
TERMINAL_STREAM = 3
FIRST_PIPE_STREAM = 16
