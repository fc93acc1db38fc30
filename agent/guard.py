"""The guard: one root process per guest at home, ``python -m agent.guard GUEST`` with migd's link as stdin.

First it is the source of the first migration: it freezes the process, has CRIU dump it, and commits.
Then the frozen original becomes the deputy, and the guard stays as home's end of the lifeline: it holds
the process's pipes, serves the home view, and passes signals, stops and the end between deputy and keeper.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from agent import guestwords, spawning
from agent.bulk import Bulk
from agent.cgroups import Cgroup, dissolve, guest_path, leave_cgroup
from agent.command_home import CommandHome, lost_line
from agent.departure import Departure, InDoubt, Outcome, failure_words
from agent.deputy_link import (
    Broken,
    Continued,
    DeputyLink,
    DeputyListener,
    Ready,
    Signalled,
    process_state,
)
from agent.endpoints import End, FdSink, PeekSource
from agent.fresh_tree import FreshTree, put_back
from agent.home_line import HomeLine
from agent.home_terminal import HomeTerminal
from agent.injection import DeputyProgram, MuteDeputy, become_deputy
from agent.journal import Entry, Journal, Side, State
from agent.lifeline import CONTROL
from agent.link import (
    Attach,
    Departed,
    Ended,
    Failed,
    GuestLost,
    Link,
    NeedLifeline,
    Packet,
    Progress,
    StartCommand,
    StartDeparture,
    Verdict,
    in_doubt,
    listen,
    take_stdin,
)
from agent.links import Links
from agent.reactor import READ, Reactor
from agent.terminal import TERMINAL_WINDOW
from agent.waiting import wait_until
from criu_hooks.calls import CriuCall
from migrate import paths
from migrate.errors import MigrateError, PeerError

log = logging.getLogger(__name__)

STATE_POLL_SECONDS = 0.2
"""SIGSTOP on the deputy is told to nobody but its parent: so we look."""
FAREWELL_SECONDS = 2.0
CUT_SECONDS = 3.0
"""Shorter cuts are not told to a command's user."""
DEPUTIES_DIR = paths.RUN_DIR / "deputies"
LOST_EXIT_CODE = -signal.SIGKILL


class Guard:
    """See the module. `run` returns when the guest is no more (or never left)."""

    def __init__(self, guest: str, link: Link) -> None:
        self._guest = guest
        self._migd = link
        self._reactor = Reactor()
        self._links = Links(self._reactor, self._packet)
        self._journal = Journal()
        self._directory = paths.GUESTS_DIR / f"guard-{guest}"
        self._socket = DEPUTIES_DIR / guest
        self._line: HomeLine | None = None
        self._next: HomeLine | None = None
        self._line_lost = False
        """the keeper that `_line` led to is no more; the guest is where `_next` leads, or lost"""
        self._start: StartDeparture | StartCommand | None = None
        self._tree: FreshTree | CommandHome | None = None
        self._command: CommandHome | None = None
        self._listener: DeputyListener | None = None
        self._deputy: DeputyLink | None = None
        self._mute: MuteDeputy | None = None
        self._deputy_dead = False
        self._deputy_stopped = False
        self._guest_stopped = 0
        self._closed_fds: set[int] = set()
        self._sinks: list[FdSink] = []
        self._sources: list[PeekSource] = []
        self._terminal: HomeTerminal | None = None
        self._verdict: bool | None = None
        self._exit_code: int | None = None
        self._rest = False
        """the guest has ended, but left background processes"""
        self._cut_said = False
        self._finished = False

    def run(self) -> None:
        """Everything, in order."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = Cgroup(guest_path("guard", self._guest, "own"))
        own.create()
        own.add(os.getpid())
        try:
            with listen(self._directory / "guard.sock") as server:
                self._reactor.register(server.fileno(), READ, lambda _: self._accept(server))
                first = self._migd.receive()
                if first is None:
                    return
                self._links.add(self._migd)
                match first:
                    case (StartDeparture() as departure, fds):
                        away = self._depart(departure, fds)
                    case (StartCommand() as command, fds):
                        away = self._begin_command(command, fds)
                    case _:
                        away = False
                while away and not self._finished:
                    self._reactor.turn()
                self._reactor.unregister(server.fileno())
        finally:
            self._give_back()

    # ------------------------------------------------------------------ the first migration

    def _depart(self, start: StartDeparture, fds: list[int]) -> bool:
        self._start = start
        offer = start.offer
        bulk = Bulk(self._reactor, start.destination, fds[0], fds[1], offer.freeze_limit_seconds)
        images = self._directory / "dump"
        try:
            with CriuCall(spawning.connect(spawning.WORKERS)) as call:
                tree = self._tree = FreshTree(start, self._open_streams)
                self._journal.record(
                    Entry.begin(
                        offer,
                        Side.SOURCE,
                        start.destination,
                        peer_boot_id=start.destination_boot_id,
                        starttime_ticks=start.starttime_ticks,
                        origin_cgroup=str(tree.origin),
                    )
                )
                self._line = self._connect(start.destination)
                self._line.lifeline.attach(fds[2], fds[3])
                images.mkdir(mode=0o700)
                departure = Departure(
                    self._reactor, self._journal, bulk, start, tree, self._links.say
                )
                try:
                    outcome = departure.run(call, images)
                except InDoubt as doubt:
                    outcome = self._await_verdict(str(doubt), departure)
        except (MigrateError, OSError) as error:
            what, reason, remedy = failure_words(error)
            self._journal.move(
                offer.transaction, Side.SOURCE, State.ABORTED, after=State.BEGUN, reason=reason
            )
            log.info("%s: not moved: %s", offer.transaction, error)
            self._links.say(Failed(offer.transaction, what, reason, remedy))
            return False
        finally:
            bulk.close()
            shutil.rmtree(images, ignore_errors=True)
        self._connect_streams(tree)
        self._links.say(
            Departed(
                offer.transaction,
                start.destination,
                outcome.frozen_seconds * 1000,
                outcome.sent_bytes,
            )
        )
        self._stand_deputy(tree)
        return True

    def _connect(self, host: str) -> HomeLine:
        assert self._start is not None
        offer = self._start.offer
        return HomeLine(
            self._reactor,
            self._guest,
            host,
            offer.owner,
            serve_view=host != offer.home,
            on_word=self._heard,
            on_down=self._cut,
        )

    def _await_verdict(self, doubt: str, departure: Departure) -> Outcome:
        """Committed, and the destination silent: nothing runs here until its record is known."""
        assert self._start is not None
        log.warning("%s: in doubt: %s", self._start.offer.transaction, doubt)
        self._links.say(in_doubt(self._start, doubt))
        while self._verdict is None:
            self._reactor.turn()
        return departure.conclude(self._verdict)

    # ------------------------------------------------------------------ a command

    def _begin_command(self, start: StartCommand, fds: list[int]) -> bool:
        """`migrate COMMAND`: the client becomes the deputy of a process that begins elsewhere."""
        self._start = start
        line = self._line = self._connect(start.destination)
        line.lifeline.attach(fds[0], fds[1])
        command = self._tree = self._command = CommandHome(self._reactor, start, fds[2:])
        try:
            command.prepare(line)
            self._listen_for_deputy(command.pid)
            program = Path(__file__).with_name("deputy.py")
            command.begin(line, self._journal, self._socket, program, self._close_at_deputy)
        except (MigrateError, OSError) as error:
            log.info("%s: not begun: %s", start.offer.transaction, error)
            command.refuse(MigrateError(*failure_words(error)))
            line.send(guestwords.Kill())
            control = line.lifeline.open(CONTROL).sender
            wait_until(
                self._reactor,
                lambda: control.acked >= control.end or not line.lifeline.attached,
                FAREWELL_SECONDS,
            )
            return False
        self._stand_at_terminal(line, command.pid, command.release_terminal(), command.in_front)
        self._reactor.watch_pid(command.pid, self._deputy_ended)
        self._watch_state()
        return True

    def _listen_for_deputy(self, pid: int) -> None:
        assert self._start is not None
        owner = self._start.offer.owner
        DEPUTIES_DIR.mkdir(exist_ok=True)
        DEPUTIES_DIR.chmod(0o711)
        self._listener = DeputyListener(self._socket, pid, owner.uid, owner.gid)
        self._reactor.register(self._listener.fileno(), READ, lambda _: self._deputy_knocks())

    # ------------------------------------------------------------------ streams

    def _open_streams(self, numbers: list[int]) -> None:
        assert self._line is not None
        if self._start is not None and self._start.offer.terminal is not None:
            self._line.lifeline.open(guestwords.TERMINAL_STREAM, TERMINAL_WINDOW)
        for number in numbers:
            self._line.lifeline.open(number)

    def _connect_streams(self, tree: FreshTree) -> None:
        assert self._line is not None
        if tree.terminal is not None:
            fd = tree.terminal.release()
            self._stand_at_terminal(self._line, tree.pid, fd, tree.terminal.in_front)
        for pipe in tree.pipe_list:
            stream = self._line.lifeline.open(pipe.stream)
            fd = tree.pipes.pop(pipe.stream)
            kept = tree.stdio.get(pipe.stream, [])

            def over(end: End, kept: list[int] = kept) -> None:
                self._close_at_deputy(kept)

            if pipe.outgoing:
                self._sinks.append(FdSink(self._reactor, stream.receiver, fd, on_end=over))
            else:
                self._sources.append(PeekSource(self._reactor, stream.sender, fd, on_end=over))

    def _stand_at_terminal(self, line: HomeLine, deputy: int, fd: int, in_front: bool) -> None:
        if fd < 0:
            return
        self._terminal = HomeTerminal(
            self._reactor,
            line.lifeline.open(guestwords.TERMINAL_STREAM, TERMINAL_WINDOW),
            fd,
            deputy,
            self._to_keeper,
            lambda: self._line is not None and self._line.lifeline.up,
        )
        self._terminal.start(in_front=in_front)

    def _close_at_deputy(self, fds: list[int]) -> None:
        """The guest has closed these, or nobody reads them: home's others must see that."""
        self._closed_fds.update(fds)
        if self._deputy is not None:
            for fd in fds:
                self._deputy.close_descriptor(fd)

    # ------------------------------------------------------------------ the deputy

    def _stand_deputy(self, tree: FreshTree) -> None:
        """The frozen original becomes the deputy, in the cgroup where the original was."""
        assert tree.tree is not None
        self._listen_for_deputy(tree.pid)
        members: list[int] = []
        for process in tree.tree.members[1:]:
            with contextlib.suppress(ProcessLookupError):
                members.append(os.pidfd_open(process.pid))
        script = Path(__file__).with_name("deputy.py")
        try:
            deputy = become_deputy(
                tree.pid,
                thaw=tree.cgroup.thaw,
                program=DeputyProgram(Path(os.path.realpath(sys.executable)), script, self._socket),
                members=members,
                keep_fds=(0, 1, 2),
                imaged_signals=tree.pending,
            )
        except MigrateError as error:
            log.warning("%s: no deputy: %s", self._guest, error)
            if process_state(tree.pid) not in (None, "Z"):
                raise
            self._to_keeper(guestwords.Kill())  # killed while it was frozen
            self._deputy_dead = True
            return
        finally:
            for pidfd in members:
                os.close(pidfd)
            put_back(tree.cgroup, tree.origin)
        if isinstance(deputy, MuteDeputy):
            self._mute = deputy
            log.warning("%s: mute deputy: %s", self._guest, deputy.reason)
        self._deputy_stopped = deputy.stopped
        self._reactor.watch_pid(tree.pid, self._deputy_ended)
        self._watch_state()

    def _deputy_knocks(self) -> None:
        assert self._listener is not None
        link = self._listener.accept()
        if link is None:
            return
        self._drop_deputy()
        self._deputy = link
        self._reactor.register(link.fileno(), READ, lambda _: self._deputy_says())

    def _drop_deputy(self) -> None:
        if self._deputy is not None:
            self._reactor.unregister(self._deputy.fileno())
            self._deputy.close()
            self._deputy = None

    def _deputy_says(self) -> None:
        assert self._deputy is not None
        for report in self._deputy.receive():
            match report:
                case Ready():
                    for fd in sorted(self._closed_fds):
                        self._deputy.close_descriptor(fd)
                    if self._exit_code is not None:
                        self._deputy.end(self._exit_code)
                    elif self._guest_stopped and not self._deputy_stopped:
                        self._deputy.stop(self._guest_stopped)
                case Signalled(number, value, group):
                    if self._terminal is not None:
                        if number == signal.SIGCONT:
                            self._terminal.continued()
                        elif self._terminal.look() and number == signal.SIGWINCH:
                            continue  # the far terminal tells all of the guest
                    self._to_keeper(guestwords.Signal(number, value, group))
                case Continued():
                    self._guest_stopped = 0
                    if self._terminal is not None:
                        self._terminal.continued()
                    self._to_keeper(guestwords.Signal(signal.SIGCONT, group=True))
                case Broken():
                    self._drop_deputy()
                    return

    def _watch_state(self) -> None:
        if self._tree is None or self._exit_code is not None:
            return
        stopped = process_state(self._tree.pid) == "T"
        if stopped and not self._deputy_stopped and not self._guest_stopped:
            self._to_keeper(guestwords.Signal(signal.SIGSTOP))
        self._deputy_stopped = stopped
        self._reactor.call_later(STATE_POLL_SECONDS, self._watch_state)

    def _deputy_ended(self) -> None:
        """By our word, or killed: then its guest is killed as well."""
        self._deputy_dead = True
        if self._exit_code is None:
            log.info("%s: the deputy was killed", self._guest)
            if self._terminal is not None and self._start is not None:
                self._terminal.deputy_died(self._start.offer.ids.sid)
            self._to_keeper(guestwords.Kill())
        self._finish_if_over()

    def _end_deputy(
        self,
        exit_code: int,
        rest: bool = False,
        left: guestwords.TerminalLeft | None = None,
    ) -> None:
        """:param rest: the guest has left processes: home stays open for them."""
        assert self._tree is not None and self._start is not None
        self._exit_code = exit_code
        self._rest = rest
        if self._terminal is not None:
            self._terminal.left(left)
        if self._mute is not None:
            self._mute.finish(exit_code)
        elif self._deputy is not None:
            self._deputy.end(exit_code)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._tree.pid, signal.SIGCONT)  # a stopped deputy hears nothing
        self._deputy_dead = self._deputy_dead or process_state(self._tree.pid) is None
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        """Over: the guest with all that it has left, and its deputy."""
        if self._exit_code is None or self._rest:
            return
        assert self._start is not None
        transaction = self._start.offer.transaction
        self._journal.move(transaction, Side.SOURCE, State.ENDED, after=State.RESUMED)
        self._finished = self._finished or self._deputy_dead

    # ------------------------------------------------------------------ the keepers

    def _to_keeper(self, word: guestwords.ToKeeper) -> None:
        if self._line is not None:
            self._line.send(word)

    def _heard(self, line: HomeLine, word: guestwords.ToGuard) -> None:
        if isinstance(word, guestwords.Started):
            if line is self._next:
                self._follow_guest(line, word)
            return
        if line is not self._line:
            return
        match word:
            case guestwords.Prepared() | guestwords.NotStarted() if self._command is not None:
                self._command_says(self._command, word)
            case guestwords.Stopped(number, offsets, left):
                self._set_offsets(offsets)
                if self._terminal is not None:
                    if self._terminal.wanted(number):
                        self._to_keeper(guestwords.Signal(signal.SIGCONT, group=True))
                        return
                    self._terminal.left(left)
                self._guest_stopped = number
                if self._deputy is not None and not self._deputy_stopped:
                    self._deputy.stop(number)
            case guestwords.Continued():
                self._guest_stopped = 0
            case guestwords.Ended(exit_code, offsets, rest, left):
                log.info("%s: ended (%d)%s", self._guest, exit_code, ", not all" if rest else "")
                self._set_offsets(offsets)
                self._end_deputy(exit_code, rest, left)
            case guestwords.Moving(step, sent_bytes, at_ms):
                self._links.say(Progress(step, sent_bytes, at_ms))
            case guestwords.Emptied() if self._rest:
                log.info("%s: the rest has ended", self._guest)
                self._rest = False
                self._finish_if_over()

    def _command_says(
        self, command: CommandHome, word: guestwords.Prepared | guestwords.NotStarted
    ) -> None:
        command.heard(word)
        if isinstance(word, guestwords.NotStarted) and self._listener is not None:
            self._complain(command, str(MigrateError(word.what, word.reason, word.remedy)))
            self._end_deputy(word.status)

    def _complain(self, command: CommandHome, text: str) -> None:
        """At its end: in a terminal that is as the command found it."""
        if self._terminal is not None:
            self._terminal.left(None)
        command.complain(text)

    def _follow_guest(self, line: HomeLine, started: guestwords.Started) -> None:
        """The guest runs with its next keeper: streams and unheard signals go there."""
        assert self._line is not None and self._start is not None
        old, self._line, self._next = self._line, line, None
        self._line_lost = False
        positions = []
        for position in started.positions:
            stream = old.lifeline.mux.release(position.stream)
            position.apply(stream)
            positions.append(guestwords.StreamPosition.of(stream))
            line.lifeline.mux.adopt(stream)
        line.send(guestwords.GoOn(tuple(positions)))
        for message in old.lifeline.mux.unheard_messages():
            line.lifeline.send_message(message)
        old.close()
        self._journal.relocate(self._start.offer.transaction, line.host, "")
        log.info("%s: runs on %s now", self._guest, line.host)

    def _set_offsets(self, offsets: tuple[tuple[int, int], ...]) -> None:
        if self._tree is None:
            return
        positions = dict(offsets)
        for file in self._tree.files:
            if file.number in positions:
                os.lseek(file.fd, positions[file.number], os.SEEK_SET)

    def _cut(self, line: HomeLine, reason: PeerError) -> None:
        if (self._exit_code is None or self._rest) and line in (self._line, self._next):
            log.warning("%s: connection with %s: %s", self._guest, line.host, reason.reason)
            if self._terminal is not None and line is self._line:
                self._terminal.cut_off()
            if line is self._next or self._next is None:
                self._links.say(NeedLifeline(line.host))
            if self._command is not None:
                self._reactor.call_later(CUT_SECONDS, lambda: self._say_cut(line))

    def _say_cut(self, line: HomeLine) -> None:
        if self._command is not None and line is self._line and not line.lifeline.attached:
            if self._exit_code is None and not self._cut_said:
                self._command.complain(f"host {line.host}: cut off; waiting for it")
            self._cut_said = True

    # ------------------------------------------------------------------ migd

    def _accept(self, server: socket.socket) -> None:
        link = self._links.accept(server)
        if link is not None:
            for line in (self._line, self._next):
                if line is not None and not line.lifeline.attached:
                    link.send(NeedLifeline(line.host))

    def _packet(self, _: Link, packet: Packet, fds: list[int]) -> None:
        match packet:
            case Attach("lifeline", host) if len(fds) == 2 and (line := self._line_to(host)):
                line.lifeline.attach(fds[0], fds[1])
            case Attach("next", host) if len(fds) == 2 and self._line is not None:
                if self._next is not None:
                    self._next.close()
                self._next = self._connect(host)
                self._next.lifeline.attach(fds[0], fds[1])
            case GuestLost(host, reason) if self._exit_code is None or self._rest:
                self._lost_at(host, reason)
            case Verdict(resumed):
                self._verdict = resumed
            case _:
                for fd in fds:
                    os.close(fd)

    def _lost_at(self, host: str, reason: str) -> None:
        """The guest is not on `host`. During a hop it may be on another: lost is it when it is on none."""
        line = self._line_to(host)
        if line is None or line.lifeline.attached:
            return  # an answer about an earlier connection
        log.info("%s: %s", self._guest, reason)
        if line is self._next:
            line.close()
            self._next = None
            if self._line is not None and not self._line.lifeline.attached and not self._line_lost:
                self._links.say(NeedLifeline(self._line.host))
        else:
            self._line_lost = True
        if not self._line_lost or self._next is not None:
            return
        if self._exit_code is not None:
            log.warning("%s: the rest is lost: %s", self._guest, reason)
            self._rest = False
            self._finish_if_over()
        else:
            log.warning("%s: lost: %s", self._guest, reason)
            if self._command is not None:
                self._complain(self._command, lost_line(host))
            self._end_deputy(LOST_EXIT_CODE)

    def _line_to(self, host: str) -> HomeLine | None:
        for line in (self._line, self._next):
            if line is not None and line.host == host:
                return line
        return None

    def _give_back(self) -> None:
        if self._terminal is not None:
            self._terminal.close()
        for sink in self._sinks:
            sink.close()
        for source in self._sources:
            source.close()
        if self._command is not None:
            self._command.close()
        for line in (self._line, self._next):
            if line is not None:
                line.close()
        self._drop_deputy()
        if self._listener is not None:
            self._reactor.unregister(self._listener.fileno())
            self._listener.close()
        if self._exit_code is not None:
            self._links.say(Ended(self._exit_code))
        self._journal.close()
        leave_cgroup()
        dissolve("guard", self._guest)
        shutil.rmtree(self._directory, ignore_errors=True)


def main() -> None:
    """Entry point of the guard process."""
    logging.basicConfig(level=logging.INFO, format="guard %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Guard(sys.argv[1], Link(take_stdin())).run()


if __name__ == "__main__":
    main()
