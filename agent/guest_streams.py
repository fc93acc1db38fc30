"""The streams of a guest where it runs: its pipes that lead home, and its terminal, on the lifeline."""

from __future__ import annotations

import os

from agent import guestwords
from agent.arrival import Arrived
from agent.endpoints import FdSource, MeteredSink
from agent.lifeline import Lifeline
from agent.link import Dumped, StreamPipe
from agent.reactor import Reactor
from agent.terminal import TERMINAL_WINDOW, FarTerminal
from agent.wire import Stream


class GuestStreams:
    """Of one guest, at its keeper: from its arrival or start to its end or its next hop."""

    def __init__(self, reactor: Reactor, terminal: FarTerminal | None) -> None:
        self._reactor = reactor
        self._terminal = terminal
        self._lifeline: Lifeline | None = None
        self._sources: dict[int, FdSource] = {}
        self._sinks: dict[int, MeteredSink] = {}
        self._fds: dict[int, int] = {}
        """stream → our end of the guest's pipe"""
        self._listed: dict[int, StreamPipe] = {}
        self._awaiting: dict[int, Stream] = {}
        self._connected = False
        self._files: dict[int, int] = {}
        """stdio descriptor of the root → our copy, which knows the offset"""
        self._marks: dict[int, int] = {}
        """stream → how much of it must be at home before the next word about an end"""

    @property
    def awaiting(self) -> bool:
        """Streams of the last keeper wait until home has told what it has of them."""
        return bool(self._awaiting)

    # ------------------------------------------------------------------ beginning

    def open(self, lifeline: Lifeline, arrived: Arrived) -> None:
        """Before the commit: from then on home may send.

        Streams of an earlier keeper are adopted only when home has told what it has of them.
        """
        self._lifeline = lifeline
        self._files = arrived.files
        for state in arrived.dumped.streams:
            self._awaiting[state.stream] = Stream.restore(state)
        for pipe in arrived.pipes:
            number = pipe.listed.stream
            self._listed[number] = pipe.listed
            self._fds[number] = pipe.our_fd
            if number not in self._awaiting:
                lifeline.open(number)
        if self._terminal is not None and guestwords.TERMINAL_STREAM not in self._awaiting:
            lifeline.open(guestwords.TERMINAL_STREAM, TERMINAL_WINDOW)

    def begin(self, lifeline: Lifeline, pipes: dict[int, StreamPipe], fds: dict[int, int]) -> None:
        """A command has started: its pipes, and our ends of them, by stream."""
        self._lifeline = lifeline
        self._listed, self._fds = pipes, fds
        self.connect()

    def positions(self) -> tuple[guestwords.StreamPosition, ...]:
        """Of the streams of the last keeper, for home to compare."""
        return tuple(guestwords.StreamPosition.of(stream) for stream in self._awaiting.values())

    def go_on(self, positions: tuple[guestwords.StreamPosition, ...]) -> None:
        """Home's answer to *started*: streams of the last keeper go on here."""
        assert self._lifeline is not None
        for position in positions:
            stream = self._awaiting.pop(position.stream, None)
            if stream is not None:
                position.apply(stream)
                self._lifeline.mux.adopt(stream)
        self._awaiting.clear()
        self.connect()

    def connect(self) -> None:
        """Let the bytes flow. May be repeated."""
        if self._connected:
            return
        assert self._lifeline is not None
        self._connected = True
        if self._terminal is not None:
            self.connect_terminal(self._lifeline)
        for number, listed in self._listed.items():
            stream = self._lifeline.open(number)
            fd = self._fds[number]
            if listed.outgoing:
                self._sources[number] = FdSource(self._reactor, stream.sender, fd, private=True)
            else:
                self._sinks[number] = MeteredSink(self._reactor, stream.receiver, fd)

    def connect_terminal(self, lifeline: Lifeline) -> None:
        """Let the terminal's bytes flow, which those of a command do before it starts."""
        if self._terminal is not None:
            stream = lifeline.open(guestwords.TERMINAL_STREAM, TERMINAL_WINDOW)
            self._terminal.connect(self._reactor, stream)

    # ------------------------------------------------------------------ a hop

    def open_pipes(self) -> tuple[StreamPipe, ...]:
        """The guest's pipes that lead home and have not come to their end."""
        assert self._lifeline is not None
        pipes = []
        for number, listed in self._listed.items():
            stream = self._lifeline.open(number)
            over = (
                stream.sender.fin or stream.sender.reset
                if listed.outgoing
                else (stream.receiver.finished or stream.receiver.reset)
            )
            if not over:
                inode = os.fstat(self._fds[number]).st_ino
                pipes.append(
                    StreamPipe(number, f"pipe:[{inode}]", listed.outgoing, listed.size_bytes)
                )
        return tuple(pipes)

    def hand_over(self) -> Dumped:
        """All is frozen: how far each stream is, for the next keeper."""
        assert self._lifeline is not None
        self._settle()
        terminal = None
        numbers = [*self._listed]
        if self._terminal is not None:
            terminal = self._terminal.hand_over()
            numbers.append(guestwords.TERMINAL_STREAM)
        states = tuple(self._lifeline.open(number).export() for number in numbers)
        return Dumped(self.open_pipes(), tuple(self._files), states, terminal)

    def take_back(self) -> None:
        """The hop has failed."""
        if self._terminal is not None:
            self._terminal.take_back()

    # ------------------------------------------------------------------ the end

    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Where the guest is in each file of its stdio."""
        return tuple((number, os.lseek(fd, 0, os.SEEK_CUR)) for number, fd in self._files.items())

    def output_is_home(self) -> bool:
        """Whether all that had been written when this was first asked has arrived."""
        assert self._lifeline is not None
        if self._terminal is not None and not self._terminal.settled():
            return False
        senders = {number: self._lifeline.open(number).sender for number in self._listed}
        if not self._marks:
            self._settle()
            self._marks = {number: sender.end for number, sender in senders.items()}
        if any(not s.reset and s.acked < self._marks[n] for n, s in senders.items()):
            return False
        self._marks = {}
        return True

    def close(self) -> None:
        """Let go of the guest's pipes."""
        for source in self._sources.values():
            source.close()
        for sink in self._sinks.values():
            sink.close()

    def _settle(self) -> None:
        for source in self._sources.values():
            source.drain()
        for sink in self._sinks.values():
            sink.settle()
