"""The deputy: stands at home with the pid of a process that runs elsewhere.

    python3 -I -S -X utf8 deputy.py SOCKET COMM SIGNALFD KEEP IMAGED [PADDING…]

It is started by an injected execve (agent/injection.py) inside the process that it replaces, as its
user, with every signal blocked. SOCKET is the guard's unix socket, COMM the name for ps, SIGNALFD
an inherited signalfd over all signals, KEEP the descriptors to keep open (`0,1,2`), IMAGED the
signals, once for each instance, that were pending in the image and so belong to the guest; both
lists may be empty. PADDING is room for the command line that ps shall show.

Lines of ASCII, deputy → guard:
    READY          first on every connection; all that is not yet answered by GOT follows again
    SIG N [VALUE]  a signal arrived; VALUE (64 bits, unsigned) if it came from sigqueue(3)
    GROUP N        a signal arrived from the kernel, as ^C of a terminal comes: for the whole group
    CONT           continued after a STOP; the SIGCONT that did it is not reported besides
    HELD           HOLD is in force
    GONE           EXIT or KILLED was read, the end follows
guard → deputy:
    GOT N          so many more SIG lines are dealt with
    STOP N         the guest was stopped by signal N: stop by it too, for the parent to see
    EXIT CODE      end with this status
    KILLED N       die by signal N, without a core file
    CLOSE FD       the guest closed this one of the KEEP descriptors
    HOLD / FREE    leave signals pending in the kernel / report them again

Stop signals other than SIGSTOP are only reported: the deputy waits for the guard's STOP. In an
orphaned process group the kernel ignores those, and SIGSTOP takes their place.

If the connection breaks the deputy neither ends (its end would be taken for the guest's) nor reads
signals (they wait in the kernel): it tries again after 10 ms, 20 ms, … 1 s until a guard is there.
A timer, since inotify on the socket would miss a guard that only starts to listen.

Only C modules that the interpreter has loaded anyway or that load for little: no `os`, `signal`,
`socket`. The process must stay below 12 MB.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import posix
import select
import sys

SIGNAL_RECORD = 128  # struct signalfd_siginfo, signalfd(2)
UNANSWERED_LIMIT = 64
LINE_LIMIT = 4096
CLOSE_ALL = (1 << 31) - 1

STOP_SIGNALS = (_signal.SIGSTOP, _signal.SIGTSTP, _signal.SIGTTIN, _signal.SIGTTOU)
SI_USER, SI_QUEUE, SI_TKILL, SI_KERNEL = 0, -1, -6, 0x80
# From the kernel these are about the process itself: its timers, children, descriptors and limits,
# all of which the guest has for itself. From the kernel others come too: ^C, hangups.
OWN_AFFAIRS = frozenset(
    (
        _signal.SIGALRM,
        _signal.SIGVTALRM,
        _signal.SIGPROF,
        _signal.SIGCHLD,
        _signal.SIGIO,
        _signal.SIGURG,
        _signal.SIGPIPE,
        _signal.SIGXCPU,
        _signal.SIGXFSZ,
        *range(32, 65),
    )
)


class Signal:
    """One signal that arrived."""

    def __init__(self, record: bytes) -> None:
        """:param record: a struct signalfd_siginfo."""
        self.number = int.from_bytes(record[0:4], sys.byteorder)
        self.code = int.from_bytes(record[8:12], sys.byteorder, signed=True)
        self.value = int.from_bytes(record[48:56], sys.byteorder)

    def is_for_guest(self) -> bool:
        """Whether it was meant for the process, not for what the deputy itself is and does."""
        return self.number not in OWN_AFFAIRS or self.code in (SI_USER, SI_QUEUE, SI_TKILL)

    def line(self) -> str:
        """The report to the guard."""
        if self.code == SI_QUEUE:
            return f"SIG {self.number} {self.value}\n"
        if self.code == SI_KERNEL:
            return f"GROUP {self.number}\n"
        return f"SIG {self.number}\n"


class Deputy:
    """The state of the deputy; `run` never returns."""

    def __init__(self, address: str, signals: int, kept: set[int], imaged: list[int]) -> None:
        self.address = address
        self.signals = signals
        self.kept = kept
        self.imaged = imaged
        self.guard: _socket.socket | None = None
        self.input = b""
        self.unanswered: list[str] = []
        self.held = False
        self.ready = False
        self.retry_ms = 10

    def run(self) -> None:
        """Serve for ever, whatever happens to the connection."""
        while True:
            try:
                if not self.ready:
                    self.take_pending()
                if self.guard is None:
                    self.connect()
                self.serve()
            except Exception:
                # Whatever it was: an end of this process would be taken for the guest's.
                self.disconnect()

    def take_pending(self) -> None:
        """Read what is pending already, before anybody hears that the deputy stands: a timer's last signal would
        swallow one that is sent later. Without poll(2), which says that it stands (agent/injection.py)."""
        posix.set_blocking(self.signals, False)
        try:
            while len(self.unanswered) < UNANSWERED_LIMIT:
                self.report(Signal(posix.read(self.signals, SIGNAL_RECORD)))
        except BlockingIOError:
            pass
        posix.set_blocking(self.signals, True)
        self.ready = True

    def connect(self) -> None:
        """One attempt; a failure leaves `guard` None and makes the next wait longer."""
        guard = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            guard.connect(self.address)
        except OSError:
            guard.close()
            self.retry_ms = min(self.retry_ms * 2, 1000)
            return
        self.guard = guard
        self.retry_ms = 10
        self.send("READY\n" + "".join(self.unanswered))

    def disconnect(self) -> None:
        """Forget the guard; a new one knows nothing of a HOLD."""
        if self.guard is not None:
            self.guard.close()
        self.guard = None
        self.input = b""
        self.held = False

    def serve(self) -> None:
        """Wait for one event and deal with it."""
        poll = select.poll()
        if self.guard is None:
            poll.poll(self.retry_ms)
            return
        poll.register(self.guard.fileno(), select.POLLIN)
        if not self.held and len(self.unanswered) < UNANSWERED_LIMIT:
            poll.register(self.signals, select.POLLIN)
        for fd, _ in poll.poll():
            if fd == self.signals:
                self.report(Signal(posix.read(fd, SIGNAL_RECORD)))
            else:
                self.receive()
                return

    def report(self, signal: Signal) -> None:
        """Pass a signal on, once, unless the guest has it already or it is none of its business."""
        if signal.number == _signal.SIGCHLD:
            reap()
        if signal.number in self.imaged:
            self.imaged.remove(signal.number)
        elif signal.is_for_guest():
            self.unanswered.append(signal.line())
            self.send(signal.line())

    def send(self, text: str) -> None:
        """Write to the guard. :raises OSError: it is gone."""
        data = text.encode()
        while data and self.guard is not None:
            data = data[self.guard.send(data, _socket.MSG_NOSIGNAL) :]

    def receive(self) -> None:
        """Read and obey. Unknown words are a newer guard's, and left alone.

        :raises OSError, ValueError: the guard is gone, or talks nonsense.
        """
        assert self.guard is not None
        data = self.guard.recv(LINE_LIMIT)
        if not data or len(self.input) > LINE_LIMIT:
            raise OSError
        *lines, self.input = (self.input + data).split(b"\n")
        for line in lines:
            word, _, argument = line.decode("ascii").partition(" ")
            if word == "HOLD":
                self.held = True
                self.send("HELD\n")
            elif word == "FREE":
                self.held = False
            elif word in ("GOT", "STOP", "EXIT", "KILLED", "CLOSE"):
                self.obey(word, int(argument))

    def obey(self, word: str, number: int) -> None:
        """Do what a line with a number says."""
        if word == "GOT":
            del self.unanswered[:number]
        elif word == "STOP":
            stop(number)
            self.send("CONT\n")
        elif word == "EXIT":
            self.farewell()
            posix._exit(number & 0xFF)
        elif word == "KILLED":
            self.farewell()
            die(number)
        elif word == "CLOSE" and number in self.kept:
            self.kept.remove(number)
            posix.close(number)

    def farewell(self) -> None:
        """Say GONE, to whoever is still there."""
        try:
            self.send("GONE\n")
        except OSError:
            self.disconnect()


def raise_default(number: int) -> None:
    """Let signal `number` do to this process what it does by default."""
    if number not in (_signal.SIGKILL, _signal.SIGSTOP):
        _signal.signal(number, _signal.SIG_DFL)
    posix.kill(posix.getpid(), number)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (number,))
    _signal.pthread_sigmask(_signal.SIG_BLOCK, (number,))


def stop(number: int) -> None:
    """Stop by this signal; return when continued. The SIGCONT is taken from the queue."""
    raise_default(number if number in STOP_SIGNALS else _signal.SIGSTOP)
    # Whoever stopped has a SIGCONT pending now (it is blocked); without one, the stop was ignored.
    if _signal.SIGCONT not in _signal.sigpending():
        posix.kill(posix.getpid(), _signal.SIGSTOP)
    if _signal.SIGCONT in _signal.sigpending():
        _signal.sigwait((_signal.SIGCONT,))


def die(number: int) -> None:
    """Die by this signal, by SIGKILL if it does not kill. The guard has limited core files."""
    try:
        raise_default(number)
    except (OSError, ValueError):
        posix.kill(posix.getpid(), _signal.SIGKILL)
    posix.kill(posix.getpid(), _signal.SIGKILL)


def reap() -> None:
    """Bury the dead children of the process whose place this is."""
    try:
        while posix.waitpid(-1, posix.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def close_all_but(kept: set[int]) -> None:
    """Close every descriptor but these."""
    low = 0
    for fd in sorted(kept):
        if low < fd:  # closerange(0, 0) would close everything
            posix.closerange(low, fd)
        low = fd + 1
    posix.closerange(low, CLOSE_ALL)


def rename(comm: str) -> None:
    """Take the name that ps shows; a process may write only its own."""
    try:
        fd = posix.open("/proc/self/comm", posix.O_WRONLY)
        posix.write(fd, comm.encode("utf-8", "surrogateescape"))
        posix.close(fd)
    except OSError:
        pass


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(word) for word in text.split(",") if word]


def main() -> None:
    """Set up from the arguments, then serve."""
    for timer in (_signal.ITIMER_REAL, _signal.ITIMER_VIRTUAL, _signal.ITIMER_PROF):
        _signal.setitimer(timer, 0)
    address, comm, signals, kept, imaged = sys.argv[1:6]
    close_all_but({int(signals), *numbers(kept)})
    rename(comm)
    reap()
    Deputy(address, int(signals), set(numbers(kept)), numbers(imaged)).run()


if __name__ == "__main__":
    main()
