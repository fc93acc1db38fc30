"""The command `migrate`, run as users run it, before a migd that the test plays itself."""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migrate import client, messages, paths, reaching
from migrate.errors import HostError, MigrateError
from migrate.framing import HEADER_BYTES, encode_frame, recv_frame
from migrate.messages import Checked, Move, Moved, Obstacle, Progress, Refused

LONG = 30.0
CHECKOUT = Path(__file__).parents[2]
PROGRAM = """\
import pathlib, sys
from migrate import paths
paths.MIGD_SOCKET = pathlib.Path(sys.argv.pop(1))
from migrate.entry import main
main()
"""
MOVED = Moved(0x1A2B, "node3", 48.4, 212 << 20, ("a note",))


@dataclass
class Migd:
    """Answers each connection with the next of `scripts`: replies, or bytes as they are."""

    path: Path
    scripts: list[list[messages.Reply | bytes]]
    asked: list[messages.Request] = field(default_factory=list)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            listener.listen()
            listener.settimeout(LONG)
            thread = threading.Thread(target=self._serve, args=(listener,))
            thread.start()
            try:
                yield
            finally:
                with socket.socket(socket.AF_UNIX) as last:
                    last.connect(str(self.path))  # and says nothing, which ends the thread
                thread.join(LONG)

    def _serve(self, listener: socket.socket) -> None:
        for script in self.scripts:
            connection, _ = listener.accept()
            with connection:
                frame = recv_frame(connection)
                if frame is None:
                    return
                self.asked.append(messages.decode_request(frame))
                for item in script:
                    if not isinstance(item, bytes):
                        item = encode_frame(messages.encode(item))
                    connection.sendall(item)


def argv(path: Path, *words: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(path), *words]


def run(path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Piped, as in a script."""
    return subprocess.run(
        argv(path, *words),
        cwd=CHECKOUT,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
    )


def migd(tmp_path: Path, *scripts: list[messages.Reply | bytes]) -> Migd:
    return Migd(tmp_path / "migd.sock", list(scripts))


def test_every_pid_is_asked_for_in_turn_and_pipes_see_nothing(tmp_path: Path) -> None:
    server = migd(tmp_path, [Progress("dumped", 5), MOVED], [MOVED])
    with server.serving():
        done = run(server.path, "-p", "0x1a2b", "-p", "6699", "-h", "node3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.asked == [Move(0x1A2B, "node3"), Move(6699, "node3")]


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (("-p", "10"), Move(10)),
        (("-p", "0x10"), Move(16)),
        (("-p0x10",), Move(16)),
        (("-p", "10", "-H", "3"), Move(10, host_id=3)),
        (("-H", "65535", "-p", "10"), Move(10, host_id=65535)),
        (("-p", "10", "--check"), Move(10, check_only=True)),
    ],
)
def test_what_a_user_says_is_what_migd_is_asked(
    tmp_path: Path, words: tuple[str, ...], request_: Move
) -> None:
    server = migd(tmp_path, [MOVED])
    with server.serving():
        done = run(server.path, *words)
    assert done.returncode == 0
    assert server.asked == [request_]


def test_verbose_says_what_was_done_also_when_piped(tmp_path: Path) -> None:
    server = migd(tmp_path, [MOVED])
    with server.serving():
        done = run(server.path, "-v", "-p", "0x1a2b")
    assert done.stdout == "0x1a2b → node3  (frozen 48 ms, 212 MiB)\n"
    assert done.stderr == "migrate: a note\n"
    assert done.returncode == 0


def test_a_locale_without_an_arrow_is_no_failure(tmp_path: Path) -> None:
    server = migd(tmp_path, [MOVED])
    with server.serving():
        done = run(server.path, "-v", "-p", "0x1a2b", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "0x1a2b ? node3  (frozen 48 ms, 212 MiB)\n")


def test_debug_shows_each_step(tmp_path: Path) -> None:
    server = migd(tmp_path, [Progress("frozen"), Progress("dumped", 4096, 12.34), MOVED])
    with server.serving():
        done = run(server.path, "-D", "-p", "0x1a2b")
    assert done.stderr.splitlines() == [
        "0x1a2b: frozen (0 bytes, 0.0 ms after the freeze)",
        "0x1a2b: dumped (4096 bytes, 12.3 ms after the freeze)",
    ]


def test_check_tells_that_nothing_is_in_the_way(tmp_path: Path) -> None:
    server = migd(tmp_path, [Checked(6699, ("a note",))])
    with server.serving():
        done = run(server.path, "--check", "-p", "6699")
    assert (done.returncode, done.stdout) == (0, "0x1a2b can move\n")
    assert done.stderr == "migrate: a note\n"


def test_every_reason_is_one_line_and_the_other_pids_still_move(tmp_path: Path) -> None:
    reasons = Refused((Obstacle("fd 3", "is a lock", "release it"), Obstacle("fd 4", "is odd")))
    server = migd(tmp_path, [reasons], [MOVED])
    with server.serving():
        done = run(server.path, "-v", "-p", "5", "-p", "0x1a2b")
    assert done.returncode == 125
    assert done.stderr.splitlines() == [
        "migrate: fd 3: is a lock; release it",
        "migrate: fd 4: is odd",
        "migrate: a note",
    ]
    assert done.stdout.startswith("0x1a2b → node3")
    assert [request.pid for request in server.asked if isinstance(request, Move)] == [5, 0x1A2B]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--check",), "migrate: --check: no process named; use -p PID"),
        (("-E", "/bin/ls"), "migrate: -E: needs the command's argv[0]"),
        (("-b", "-E", "", "ls"), "migrate: -E: names no file"),
        (
            ("-p", "5", "-h", "node2", "-H", "2"),
            "migrate: migrate: -h and -H exclude each other; use one of them",
        ),
        (("-p", "1a2b"), "migrate: pid 1a2b: hex needs its prefix; write 0x1a2b"),
        (("-p", "0"), "migrate: pid 0: no process has the id 0"),
        (("-p", "5", "-h", ""), "migrate: -h: names no host; leave it out to have one chosen"),
        (("-p", "5", "-H", "0"), "migrate: host id 0: host ids are 1 to 65535; use -h for a name"),
        (
            ("-p", "5", "-H", "-1"),
            "migrate: host id -1: host ids are 1 to 65535; use -h for a name",
        ),
        (
            ("-p", "5", "-H", "9" * 30),
            f"migrate: host id {'9' * 30}: host ids are 1 to 65535; use -h for a name",
        ),
        (("-p", "5", "-H", "node2"), "migrate: host id node2: host ids are 1 to 65535"),
        (("-p",), "migrate: Option '-p' requires an argument; see `migrate --help`"),
        (("-p", "5", "-h"), "migrate: Option '-h' requires an argument; see `migrate --help`"),
        (("-p", "5", "6"), "migrate: -p: moves processes, and runs no command"),
        (("-p", "5", "-b"), "migrate: -p: moves processes, and runs no command"),
        (("--wat",), "migrate: No such option: --wat"),
    ],
)
def test_own_failures_are_one_line_and_125_and_nothing_is_asked(
    tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    server = migd(tmp_path, [MOVED])
    with server.serving():
        done = run(server.path, *words)
    assert done.returncode == 125
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert server.asked == []


def test_one_wrong_pid_among_many_moves_none(tmp_path: Path) -> None:
    server = migd(tmp_path, [MOVED])
    with server.serving():
        done = run(server.path, "-p", "5", "-p", "oops")
    assert done.returncode == 125
    assert server.asked == []


def test_without_migd_the_user_is_told_to_start_it(tmp_path: Path) -> None:
    done = run(tmp_path / "nobody", "-p", "5")
    assert done.returncode == 125
    assert done.stderr == (
        "migrate: migd: cannot be reached (No such file or directory);"
        " start it: systemctl start migd\n"
    )


@pytest.mark.parametrize("script", [[], [Progress("dumped")], [b"\0\0"], [b"\0\0\0\1\xc1"]])
def test_a_migd_that_breaks_off_is_one_line_without_a_traceback(
    tmp_path: Path, script: list[messages.Reply | bytes]
) -> None:
    server = migd(tmp_path, script)
    with server.serving():
        done = run(server.path, "-p", "5")
    assert done.returncode == 125
    assert re.fullmatch(r"migrate: [^\n]+\n", done.stderr)


def test_help_is_only_the_long_option(tmp_path: Path) -> None:
    done = run(tmp_path / "nobody", "--help")
    assert done.returncode == 0
    for option in ("-p", "-h", "-H", "-v", "-D", "--check"):
        assert f" {option} " in done.stdout


def test_what_a_user_types_loads_nothing_heavy() -> None:
    program = "import sys, migrate.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=LONG
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "migrate" in loaded
    assert not loaded & {"paramiko", "google", "pycriu", "agent", "criu_hooks", "psutil"}


def on_terminal(path: Path, *words: str) -> str:
    """What a terminal shows of it."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(CHECKOUT)
        environ = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        os.execve(sys.executable, argv(path, *words), environ)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last one has closed it
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 125)
    return shown.decode()


def test_a_terminal_shows_progress_and_then_only_the_result(tmp_path: Path) -> None:
    server = migd(tmp_path, [Progress("frozen"), Progress("dumped", 64 << 20), MOVED])
    with server.serving():
        shown = on_terminal(server.path, "-p", "0x1a2b")
    progress, result = shown.split("\r\033[K")
    assert re.fullmatch(r"\r0x1a2b: 64 MiB, \d+ MB/s\033\[K", progress)
    assert result == "0x1a2b → node3  (frozen 48 ms, 212 MiB)\r\n"


def test_a_refusal_on_a_terminal_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    refusal = Refused((Obstacle("fd 3", "is a lock"),))
    server = migd(tmp_path, [Progress("dumped", 64 << 20), refusal])
    with server.serving():
        shown = on_terminal(server.path, "-p", "5")
    assert shown.endswith("\r\033[Kmigrate: fd 3: is a lock\r\n")


def test_an_interrupt_ends_it_quietly(tmp_path: Path) -> None:
    path = tmp_path / "migd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(LONG)
        with subprocess.Popen(
            argv(path, "-p", "5"), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            connection, _ = listener.accept()
            with connection:
                assert recv_frame(connection) is not None
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 130
    assert b"Traceback" not in errors


# ---------------------------------------------------------------- migrate.client


def ask_all(
    server: Migd, monkeypatch: pytest.MonkeyPatch, request_: messages.Request
) -> list[messages.Reply]:
    monkeypatch.setattr(paths, "MIGD_SOCKET", server.path)
    with server.serving():
        return list(client.ask(request_))


def test_replies_come_as_they_are_made_and_the_last_one_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = migd(tmp_path, [Progress("a"), Progress("b", 7, 1.5), MOVED, Progress("never")])
    replies = ask_all(server, monkeypatch, Move(5))
    assert replies == [Progress("a"), Progress("b", 7, 1.5), MOVED]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([], "ended before it answered"),
        ([Progress("dumped")], "ended before it answered"),
        ([encode_frame(b"\xc1")], "the connection broke"),
        ([encode_frame(b"")], "the connection broke"),
        ([encode_frame(messages.encode(Move(5)))], "the connection broke"),
    ],
)
def test_a_migd_without_a_sensible_answer_is_a_host_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: list[messages.Reply | bytes],
    reason: str,
) -> None:
    with pytest.raises(HostError, match=f"^migd: {re.escape(reason)}"):
        ask_all(migd(tmp_path, script), monkeypatch, Move(5))


@pytest.mark.parametrize(
    "raw", [b"\0", encode_frame(b"half")[:-1], b"\xff" * HEADER_BYTES], ids=["head", "half", "huge"]
)
def test_a_frame_that_is_none_is_an_error_for_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    with pytest.raises(MigrateError):
        ask_all(migd(tmp_path, [raw]), monkeypatch, Move(5))


def test_a_socket_that_nobody_serves_is_a_host_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    monkeypatch.setattr(paths, "MIGD_SOCKET", path)
    monkeypatch.setattr(reaching, "RESTART_SECONDS", 0.0)
    with pytest.raises(HostError, match="cannot be reached"):
        next(client.ask(Move(5)))
