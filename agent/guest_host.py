"""The keeper's inner process: parent of the guest, far end of the lifeline, source of the next hop."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

from agent import capsule, guestwords, spawning, syscalls
from agent.arrival import Arrival, Arrived
from agent.bulk import Bulk
from agent.capsule_tree import CapsuleTree
from agent.cgroups import Cgroup, guest_path
from agent.command_start import CommandStart, NotExecuted
from agent.departure import Departure, InDoubt, Outcome, failure_words
from agent.endpoints import Duplex
from agent.fd_passing import close_all
from agent.guest_streams import GuestStreams
from agent.home_share import plan_root
from agent.home_view import HomeView
from agent.journal import Entry, Journal, Side, State
from agent.lifeline import CONTROL, Lifeline
from agent.link import (
    Aborted,
    Attach,
    Departed,
    Dumped,
    EndGuest,
    Failed,
    Hold,
    LifelineCut,
    Link,
    Offer,
    Packet,
    Planned,
    Progress,
    Running,
    StartDeparture,
    Verdict,
    in_doubt,
)
from agent.links import Links
from agent.programs import programs_here
from agent.reactor import READ, Reactor
from agent.rest import RestWatch
from agent.standstill import Standstill
from agent.terminal import FarTerminal
from agent.view_server import VIEW_WINDOW
from agent.waiting import wait_until
from agent.wire import ProtocolError, Receiver
from criu_hooks.calls import CriuCall
from migrate.command_wire import MAX_COMMAND_BYTES, Command, WireError
from migrate.errors import HostError, MigrateError, PeerError
from migrate.framing import MALFORMED

log = logging.getLogger(__name__)

ATTACH_SECONDS = 20.0
END_POLL_SECONDS = 0.005
"""Between looks whether the last output has arrived at home."""
FAREWELL_SECONDS = 60.0
NOT_STARTED_SECONDS = 5.0
OWN_FAILURE = 125


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class GuestHost:
    """See the module."""

    def __init__(
        self,
        offer: Offer,
        link: Link,
        server: socket.socket,
        view: HomeView | None,
        images: Path,
        call: CriuCall | None,
        devpts: Path,
        terminal: FarTerminal | None,
    ) -> None:
        self._offer = offer
        self._guest = offer.guest
        self._server = server
        self._view = view
        self._images = images
        self._call = call
        self._devpts = devpts
        self._terminal = terminal
        self._reactor = Reactor()
        self._journal = Journal()
        self._tree = Cgroup(guest_path("keeper", offer.guest, "tree"))
        self._capsule: capsule.Capsule | None = None
        self._bulk: Bulk | None = None
        self._lifeline: Lifeline | None = None
        self._hold = -1
        self._duplex: Duplex | None = None
        self._links = Links(self._reactor, self._packet)
        self._links.add(link)
        self._streams = GuestStreams(self._reactor, terminal)
        self._criu = 0
        self._born = False
        """the guest is a child of ours"""
        self._begin: guestwords.Begin | None = None
        self._command = bytearray()
        self._exit_code: int | None = None
        self._told_end = False
        self._rest: RestWatch | None = None
        self._finished = False
        self._standstill = Standstill(self._tree)
        self._hop: tuple[StartDeparture, list[int]] | None = None
        self._handing_over = False
        self._gone_on = False
        self._verdict: bool | None = None

    def run(self) -> None:
        """Receive the guest; keep it until it has ended or gone on."""
        self._watch_children()
        self._reactor.register(self._server.fileno(), READ, lambda _: self._accept())
        try:
            if self._call is None:
                self._start_command()
            else:
                with self._call:
                    self._receive(self._call)
        except Exception as error:
            if not isinstance(error, MigrateError):
                log.exception("%s: arrival failed", self._offer.transaction)
            self._abort(error)
            return
        while not self._finished:
            self._reactor.turn()
            if self._hop is not None and not self._streams.awaiting:
                self._depart(*self._hop)
                self._hop = None
        self._close()

    # ------------------------------------------------------------------ arrival

    def _receive(self, call: CriuCall) -> None:
        if not wait_until(
            self._reactor, lambda: self._bulk is not None and self._lifeline_up(), ATTACH_SECONDS
        ):
            raise PeerError(f"host {self._offer.source}", "did not connect in time")
        assert self._bulk is not None
        self._capsule = self._build_capsule()
        arrival = Arrival(
            self._reactor,
            self._journal,
            self._offer,
            self._bulk,
            self._capsule,
            self._images,
            self._terminal,
            self._view.device if self._view is not None else 0,
        )
        arrived = arrival.run(call, self._make_ready, self._standstill.let_run)
        log.info("%s: %s resumed here", self._offer.transaction, self._guest)
        self._criu = arrived.criu
        self._born = True
        self._links.say(Running())
        self._to_guard(guestwords.Started(self._offer.epoch, self._streams.positions()))
        if not self._streams.awaiting:
            self._streams.connect()
        self._bulk.close()
        self._bulk = None
        # The kernel takes its time for large ones, while home waits for the guest's output.
        threading.Thread(target=_remove, args=(list(self._images.iterdir()),), daemon=True).start()
        self._reap()

    def _build_capsule(self) -> capsule.Capsule:
        plan = None
        if self._view is not None:
            plan = plan_root(self._offer, programs_here(), self._view.mountpoint)
        root = self._images.with_name("root")
        return capsule.build(self._reactor, self._offer.hostname, plan, root, self._devpts)

    def _lifeline_up(self) -> bool:
        return self._lifeline is not None and self._lifeline.up

    def _make_ready(self, arrived: Arrived) -> None:
        """The last chance to say no: from here on home may commit."""
        if self._standstill.held:
            host = os.uname().nodename
            raise PeerError(f"host {host}", f"takes no guests now: {self._standstill.held}")
        assert self._lifeline is not None
        self._streams.open(self._lifeline, arrived)

    def _abort(self, error: BaseException) -> None:
        """It will never run here: recorded first, then said."""
        what, reason, remedy = failure_words(error)
        log.info("%s: given up: %s", self._offer.transaction, error)
        self._tree.kill()
        self._journal.move(
            self._offer.transaction,
            Side.DESTINATION,
            State.ABORTED,
            after=State.OFFERED,
            reason=reason,
        )
        entry = self._journal.find(self._offer.transaction, Side.DESTINATION)
        if self._bulk is not None:
            # Else it did resume, and the original must not go on.
            if entry is not None and entry.state is State.ABORTED:
                with contextlib.suppress(PeerError):
                    self._bulk.send_message(Aborted(what, reason, remedy))
            self._bulk.close()
        if self._offer.is_command:
            self._not_started(error, what, reason, remedy)

    def _not_started(self, error: BaseException, what: str, reason: str, remedy: str) -> None:
        transaction = self._offer.transaction
        self._journal.move(
            transaction, Side.DESTINATION, State.ENDED, after=State.RESUMED, reason=reason
        )
        if self._lifeline is not None:
            status = error.status if isinstance(error, NotExecuted) else OWN_FAILURE
            self._to_guard(guestwords.NotStarted(status, what, reason, remedy))
            control = self._lifeline.open(CONTROL).sender
            wait_until(
                self._reactor,
                lambda: control.acked >= control.end or not self._lifeline_up(),
                NOT_STARTED_SECONDS,
            )
        self._close()

    # ------------------------------------------------------------------ a command

    def _start_command(self) -> None:
        """Execute the command that the guard sends.

        :raises MigrateError: it will never run here.
        """
        wait_until(self._reactor, lambda: self._finished or self._lifeline_up(), ATTACH_SECONDS)
        if not self._lifeline_up():
            raise PeerError(f"host {self._offer.source}", "did not connect in time")
        assert self._lifeline is not None
        self._capsule = self._build_capsule()
        self._to_guard(guestwords.Prepared())
        receiver = self._lifeline.open(guestwords.COMMAND_STREAM).receiver
        ready = wait_until(
            self._reactor,
            lambda: self._finished or (self._begin is not None and receiver.finished),
            ATTACH_SECONDS,
        )
        if self._finished:
            raise PeerError(f"host {self._offer.source}", "does not want it any more")
        if not ready or self._begin is None:
            raise PeerError(f"host {self._offer.source}", "did not send the command in time")
        try:
            command = Command.decode(bytes(self._command))
        except WireError as error:
            raise PeerError(
                f"host {self._offer.source}", f"its command makes no sense: {error}"
            ) from None
        if not self._journal.move(
            self._offer.transaction, Side.DESTINATION, State.RESUMED, after=State.OFFERED
        ):
            raise HostError("journal", "the command was given up meanwhile")
        start = CommandStart(self._reactor, self._offer, self._capsule, self._tree, self._terminal)
        started = start.run(self._begin, command)
        self._to_guard(guestwords.Started(self._offer.epoch))
        self._streams.begin(self._lifeline, started.pipes, started.fds)
        self._born = True
        self._lifeline.mux.retry_messages()
        self._standstill.let_run()
        self._reap()

    def _take_command(self, receiver: Receiver) -> None:
        while view := receiver.peek():
            self._command += view
            receiver.take(len(view))
            receiver.consume(receiver.taken)
        if len(self._command) > MAX_COMMAND_BYTES:
            raise ProtocolError("a command that is too long")
        if receiver.at_end:
            receiver.finish()

    # ------------------------------------------------------------------ going on

    def _depart(self, start: StartDeparture, fds: list[int]) -> None:
        """The next hop; whatever fails before the commit leaves the guest running here."""
        assert self._capsule is not None
        offer = start.offer
        if self._exit_code is not None:
            close_all(fds)
            self._links.say(Failed(offer.transaction, f"guest {self._guest}", "has ended", ""))
            return
        bulk = Bulk(self._reactor, start.destination, fds[0], fds[1], offer.freeze_limit_seconds)
        self._standstill.leave()
        directory = self._images / "dump"
        directory.mkdir(mode=0o700)
        keys = self._terminal.keys if self._terminal is not None else ()
        tree = CapsuleTree(
            self._offer, self._capsule, self._plan, self._hand_over, self._take_back, keys
        )
        try:
            with CriuCall(spawning.connect(spawning.WORKERS)) as call:
                self._journal.record(
                    Entry.begin(
                        offer,
                        Side.SOURCE,
                        start.destination,
                        peer_boot_id=start.destination_boot_id,
                    )
                )
                departure = Departure(
                    self._reactor, self._journal, bulk, start, tree, self._tell_progress
                )
                try:
                    outcome = departure.run(call, directory)
                except InDoubt as doubt:
                    outcome = self._await_verdict(start, str(doubt), departure)
        except (MigrateError, OSError) as error:
            what, reason, remedy = failure_words(error)
            log.info("%s: not moved: %s", offer.transaction, error)
            self._links.say(Failed(offer.transaction, what, reason, remedy))
            return
        finally:
            bulk.close()
            shutil.rmtree(directory, ignore_errors=True)
        self._gone_on = self._finished = True
        self._journal.move(
            self._offer.transaction,
            Side.DESTINATION,
            State.ENDED,
            after=State.RESUMED,
            reason=f"moved on to {start.destination}",
        )
        self._tree.kill()
        self._links.say(
            Departed(
                offer.transaction,
                start.destination,
                outcome.frozen_seconds * 1000,
                outcome.sent_bytes,
            )
        )

    def _tell_progress(self, progress: Progress) -> None:
        self._links.say(progress)
        self._to_guard(guestwords.Moving(progress.step, progress.sent_bytes, progress.at_ms))

    def _plan(self) -> Planned:
        return Planned(self._streams.open_pipes(), tuple(sorted(self._tree.tids())))

    def _hand_over(self) -> Dumped:
        """All is frozen: from here on home's messages wait for whoever has the guest afterwards."""
        self._standstill.lend()
        self._handing_over = True
        return self._streams.hand_over()

    def _take_back(self) -> None:
        self._standstill.let_run()
        self._handing_over = False
        self._streams.take_back()
        if self._lifeline is not None:
            self._lifeline.mux.retry_messages()

    def _await_verdict(self, start: StartDeparture, doubt: str, departure: Departure) -> Outcome:
        log.warning("%s: in doubt: %s", start.offer.transaction, doubt)
        self._verdict = None
        self._links.say(in_doubt(start, doubt))
        while self._verdict is None:
            self._reactor.turn()
        return departure.conclude(self._verdict)

    # ------------------------------------------------------------------ the guest's parent

    def _watch_children(self) -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

        def child(events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(reading, 4096)
            if self._born:
                self._reap()

        self._reactor.register(reading, READ, child)

    def _reap(self) -> None:
        """Only our guest, and the criu that brought it: other children have others who wait."""
        root = self._offer.ids.pid
        while self._exit_code is None and not self._gone_on:
            try:
                found, status = os.waitpid(root, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                break
            if not found:
                break
            self._changed(status)
        if self._criu:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._criu, os.WNOHANG)
        if os.getpid() == 1 and self._told_end:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass  # orphans are ours; nobody else waits for a child any more

    def _changed(self, status: int) -> None:
        if os.WIFSTOPPED(status):
            left = self._terminal.leave() if self._terminal is not None else None
            self._tell_stop(guestwords.Stopped(os.WSTOPSIG(status), self._streams.offsets(), left))
        elif os.WIFCONTINUED(status):
            self._to_guard(guestwords.Continued())
        else:
            self._exit_code = os.waitstatus_to_exitcode(status)
            log.info("%s: ended (%d)", self._guest, self._exit_code)
            self._tell_end()

    def _tell_stop(self, word: guestwords.Stopped) -> None:
        """Once what it wrote on the terminal is there: home's shell writes on it next."""
        if self._terminal is None or self._terminal.settled():
            self._to_guard(word)
        elif self._exit_code is None and not self._gone_on:
            self._reactor.call_later(END_POLL_SECONDS, lambda: self._tell_stop(word))

    def _tell_end(self) -> None:
        """Tell the end once all output is at home: the deputy must not end before its last word."""
        if self._exit_code is None or self._told_end or self._lifeline is None:
            return
        if self._streams.awaiting or not self._streams.output_is_home():
            self._reactor.call_later(END_POLL_SECONDS, self._tell_end)
            return
        self._told_end = True
        rest = self._tree.populated
        left = self._terminal.leave() if self._terminal is not None else None
        self._to_guard(guestwords.Ended(self._exit_code, self._streams.offsets(), rest, left))
        if rest:
            log.info("%s: has left processes, which live on", self._guest)
            self._rest = RestWatch(self._reactor, self._tree, self._tell_empty)
        else:
            self._leave()

    def _tell_empty(self) -> None:
        """The last of the processes that an ended guest had left has ended."""
        if not self._streams.output_is_home():
            self._reactor.call_later(END_POLL_SECONDS, self._tell_empty)
            return
        log.info("%s: the rest has ended", self._guest)
        self._rest = None
        self._to_guard(guestwords.Emptied())
        self._leave()

    def _leave(self) -> None:
        self._journal.move(
            self._offer.transaction, Side.DESTINATION, State.ENDED, after=State.RESUMED
        )
        self._await_farewell(time.monotonic() + FAREWELL_SECONDS)

    def _await_farewell(self, deadline: float) -> None:
        """Leave when home has heard the end."""
        assert self._lifeline is not None
        control = self._lifeline.mux.streams[0].sender
        if control.acked >= control.end or time.monotonic() > deadline:
            self._finished = True
        else:
            self._reactor.call_later(END_POLL_SECONDS, lambda: self._await_farewell(deadline))

    # ------------------------------------------------------------------ home

    def _to_guard(self, word: guestwords.ToGuard) -> None:
        if self._lifeline is not None:
            self._lifeline.send_message(guestwords.encode(word))

    def _heard(self, message: bytes) -> bool:
        if self._handing_over:
            return False
        root = self._offer.ids.pid
        try:
            word = guestwords.decode_for_keeper(message)
        except MALFORMED as error:
            raise ProtocolError(f"a message that makes no sense: {error}") from None
        if self._waits_for_birth(word):
            return False
        match word:
            case guestwords.Signal(number, value, group):
                if self._exit_code is not None or not 1 <= number <= 64:
                    return True
                with contextlib.suppress(ProcessLookupError):
                    if group:
                        self._signal_group(number)
                    elif value is None:
                        os.kill(root, number)
                    else:
                        syscalls.queue_signal(root, number, value)
            case guestwords.Begin() if self._offer.is_command and self._begin is None:
                for pipe in word.pipes:
                    if self._lifeline is not None:
                        self._lifeline.open(pipe.stream)
                self._begin = word
                if self._terminal is not None and word.terminal is not None:
                    self._terminal.begin(word.terminal)
                    assert self._lifeline is not None
                    self._streams.connect_terminal(self._lifeline)
            case guestwords.Kill():
                self._kill()
            case guestwords.GoOn(positions):
                self._streams.go_on(positions)
            case _ if self._terminal is not None:
                self._terminal.obey(word, self._offer.ids.pgid)
        return True

    def _waits_for_birth(self, word: guestwords.ToKeeper) -> bool:
        """Signals and keys for a command wait until there is somebody who gets them."""
        early = isinstance(word, guestwords.Begin | guestwords.Kill)
        return self._offer.is_command and not self._born and not early

    def _kill(self) -> None:
        """What happened to the deputy happens to the root alone, as at home."""
        if not self._born:
            self._end()
        elif self._exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._offer.ids.pid, signal.SIGKILL)

    def _end(self) -> None:
        """Whoever waits for the view then, as the capsule's builder may, gets an error from it."""
        self._tree.kill()
        self._finished = True
        if not self._born and self._duplex is not None:
            self._duplex.close()

    def _signal_group(self, number: int) -> None:
        """:raises ProcessLookupError: the root is gone."""
        root = self._offer.ids.pid
        group = os.getpgid(root)
        if group != os.getpgrp():
            # At once: of those who go on, one may stop the others again.
            os.killpg(group, number)
            return
        os.kill(root, number)
        for pid in self._tree.pids() - {root}:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == group:
                    os.kill(pid, number)

    def _cut(self, reason: PeerError) -> None:
        """Cut off is not dead, but a guest must not run on unseen for ever (invariant 7)."""
        if self._alive and not self._gone_on:
            log.warning("%s: lifeline: %s", self._guest, reason.reason)
            self._links.say(LifelineCut())
            silent = time.monotonic() - (self._lifeline.last_heard if self._lifeline else 0)
            patience = max(0.0, self._offer.cut_freeze_seconds - silent)
            self._reactor.call_later(patience, self._freeze_if_cut)

    @property
    def _alive(self) -> bool:
        """Whether the guest, or what it has left, lives."""
        return self._exit_code is None or self._rest is not None

    def _freeze_if_cut(self) -> None:
        running = self._born and self._alive
        if running and not self._lifeline_up() and not self._gone_on:
            log.warning("%s: frozen, home is silent", self._guest)
            self._standstill.cut(True)

    def _lifeline_came(self) -> None:
        self._links.say(LifelineCut(back=True))
        self._standstill.cut(False)

    def _attach_lifeline(self, fd_in: int, fd_out: int, hold: int) -> None:
        if self._lifeline is None:
            self._lifeline = Lifeline(
                self._reactor,
                self._guest,
                epoch=self._offer.epoch,
                leads=True,
                on_message=self._heard,
                on_up=self._lifeline_came,
                on_down=self._cut,
            )
            if self._offer.is_command:
                receiver = self._lifeline.open(guestwords.COMMAND_STREAM).receiver
                receiver.on_readable = lambda: self._take_command(receiver)
            if self._view is not None:
                stream = self._lifeline.open(guestwords.VIEW_STREAM, VIEW_WINDOW)
                self._duplex = Duplex(self._reactor, stream, self._view.socket.detach())
        self._lifeline.attach(fd_in, fd_out)
        if self._hold >= 0:
            os.close(self._hold)
        self._hold = hold

    # ------------------------------------------------------------------ migd

    def _accept(self) -> None:
        link = self._links.accept(self._server)
        if link is not None and self._standstill.held:
            link.send(Hold(self._standstill.held))

    def _packet(self, link: Link, packet: Packet, fds: list[int]) -> None:
        match packet:
            case Attach("bulk") if self._bulk is None and len(fds) == 3:
                self._bulk = Bulk(
                    self._reactor,
                    self._offer.source,
                    fds[0],
                    fds[1],
                    self._offer.freeze_limit_seconds,
                    fds[2],
                )
            case Attach("lifeline") if len(fds) == 3:
                self._attach_lifeline(*fds)
            case StartDeparture() if self._hop is None and len(fds) == 2:
                self._hop = (packet, fds)
            case StartDeparture(offer):
                close_all(fds)
                reason, remedy = "is being moved already", "wait for that to end"
                link.send(Failed(offer.transaction, f"guest {self._guest}", reason, remedy))
            case Verdict(resumed):
                self._verdict = resumed
            case Hold(reason):
                self._standstill.hold(reason)
            case EndGuest(reason):
                log.warning("%s: ended: %s", self._guest, reason)
                self._end()
                if not self._born:
                    raise HostError(f"guest {self._guest}", f"was ended: {reason}")
            case _:
                for fd in fds:
                    os.close(fd)

    def _close(self) -> None:
        self._streams.close()
        if self._terminal is not None:
            self._terminal.close()
        if self._duplex is not None:
            self._duplex.close()
        if self._lifeline is not None:
            self._lifeline.detach()
        self._journal.close()
