"""One CRIU call as its owner sees it, with a worker and a criu that the test plays itself."""

import os
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from criu_hooks import calls, program
from criu_hooks.calls import CriuCall, Done, FeatureRequest, Notify, spawn_swrk
from criu_hooks.program import criu_path
from migrate.errors import CriuError, HostError

LONG = 30.0
CHECKOUT = Path(__file__).parents[2]

Play = Callable[[str], CriuCall]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Play:
    """Makes a call whose worker runs this program, with `say`, `hear` and `sock` at hand."""

    def make(program: str) -> CriuCall:
        prelude = f"""\
            #!{sys.executable}
            import os, socket, sys
            sys.path.insert(0, {str(CHECKOUT)!r})
            import msgspec
            from criu_hooks.calls import Done, Notify, Proceed
            sock = socket.socket(fileno=0)
            say = lambda event: sock.send(msgspec.msgpack.encode(event))
            hear = lambda: msgspec.msgpack.decode(sock.recv(65536), type=Proceed).ok
            """
        worker = tmp_path / "worker"
        worker.write_text(textwrap.dedent(prelude) + textwrap.dedent(program))
        worker.chmod(0o700)
        monkeypatch.setattr(calls, "sys", SimpleNamespace(executable=str(worker)))
        return CriuCall()

    return make


def test_notifications_before_the_wanted_one_are_answered(play: Play) -> None:
    program = """
        answers = []
        for script in ("pre-dump", "network-lock"):
            say(Notify(script)); answers.append(hear())
        say(Notify("post-dump", 6699)); answers.append(hear())
        say(Done(answers == [True, True, False], str(answers)))
        """
    with play(program) as call:
        call.run_until("post-dump", LONG)
        call.proceed(ok=False)
        call.finish(LONG)


def test_finish_answers_what_is_left(play: Play) -> None:
    program = """
        for script in ("post-restore", "pre-resume", "post-resume"):
            say(Notify(script)); assert hear()
        say(Done(True))
        """
    with play(program) as call:
        call.finish(LONG)


def test_a_failure_is_told_with_its_reason(play: Play) -> None:
    with (
        play("say(Done(False, 'it holds a lock'))") as call,
        pytest.raises(CriuError, match="it holds a lock"),
    ):
        call.finish(LONG)


@pytest.mark.parametrize("ok", [True, False])
def test_an_end_before_the_wanted_point_is_a_failure(play: Play, ok: bool) -> None:
    with (
        play(f"say(Done({ok}))") as call,
        pytest.raises(CriuError, match="ended before post-dump"),
    ):
        call.run_until("post-dump", LONG)


@pytest.mark.parametrize("program", ["", "os.kill(os.getpid(), 9)", "raise SystemExit(1)"])
def test_a_worker_that_dies_is_a_failed_call_and_stays_one(play: Play, program: str) -> None:
    with play(program) as call:
        for _ in range(2):
            assert call.receive(LONG) == Done(False, "the process that talks to CRIU was killed")
        call.proceed()  # to nobody, which `receive` tells


def test_silence_is_a_timeout(play: Play) -> None:
    with play("sock.recv(1)") as call, pytest.raises(TimeoutError):
        call.receive(0.01)


def test_leaving_ends_a_worker_that_would_stay(play: Play) -> None:
    program = "say(Notify(str(os.getpid())))\nimport signal\nwhile True: signal.pause()"
    with play(program) as call:
        event = call.receive(LONG)
        assert isinstance(event, Notify)
        pid = int(event.script)
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_fork_that_leaves_does_not_end_its_parents_worker(play: Play) -> None:
    with play("hear(); say(Done(True))") as call:
        child = os.fork()
        if child == 0:
            call.close()
            os._exit(0)
        os.waitpid(child, 0)
        call.proceed()
        assert call.receive(LONG) == Done(True)


def test_a_request_reaches_the_worker_with_crius_socket(play: Play) -> None:
    program = """
        data, fds, _, _ = socket.recv_fds(sock, 65536, 2)
        criu = socket.socket(fileno=fds[0])
        criu.send(b"request")
        say(Done(len(fds) == 1 and criu.recv(100) == b"response", str(fds)))
        """
    with play(program) as call:
        criu = call.criu_end.dup()
        with criu:
            call.begin(FeatureRequest())
            assert criu.recv(100) == b"request"
            criu.send(b"response")
            call.finish(LONG)


def test_when_the_worker_is_gone_criu_notices(play: Play) -> None:
    with play("socket.recv_fds(sock, 65536, 2)\nsock.recv(1)") as call:
        criu = call.criu_end.dup()
        call.begin(FeatureRequest())
    with criu:
        criu.settimeout(LONG)
        assert criu.recv(100) == b""


def test_a_request_needs_a_criu(play: Play) -> None:
    with play("") as call, pytest.raises(RuntimeError, match="comes first"):
        call.begin(FeatureRequest())


def test_a_host_without_criu_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CRIU_PATHS", ("/no/such/criu", "/proc/self/status"))
    with pytest.raises(HostError, match="criu: is not installed; install Debian's criu"):
        criu_path()


@pytest.fixture
def criu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A criu that says how it was started, on its RPC socket."""
    path = tmp_path / "criu"
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys\n"
        "rpc = socket.socket(fileno=int(sys.argv[2]))\n"
        "rpc.send(f'{sys.argv[1]} {sorted(os.listdir(\"/proc/self/fd\"))}'.encode())\n"
    )
    path.chmod(0o700)
    monkeypatch.setattr(program, "CRIU_PATHS", ("/no/such/criu", str(path)))
    return path


def test_criu_is_a_child_with_its_socket_and_the_descriptors_it_needs(criu: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept, lost = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    prepared: list[int] = []
    with ours, theirs:
        pid = spawn_swrk(theirs, [kept], lambda: prepared.append(1))
        number = theirs.fileno()
        theirs.close()
        ours.settimeout(LONG)
        said = ours.recv(4096).decode()
        assert os.waitpid(pid, 0) == (pid, 0)
    for fd in (kept, lost):
        os.close(fd)
    assert said.startswith("swrk ")
    assert f"'{number}'" in said and f"'{kept}'" in said
    assert f"'{lost}'" not in said
    assert prepared == []  # that was the child's


def test_a_child_that_cannot_be_prepared_never_becomes_criu(
    criu: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise PermissionError("no namespaces today")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            pid = spawn_swrk(theirs, [], fail)
        ours.settimeout(LONG)
        assert ours.recv(100) == b""
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 127
    assert "criu could not be started: no namespaces today" in capfd.readouterr().err
