"""What cannot be granted is refused within seconds, in one clear line, and the process runs on."""

import re
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from holding import await_reached, held, let_go
from moving import Desk, guests_at, until
from testbed.client import Nodes, Result

REFUSED = 125
SECONDS = 60.0  # of a machine that does other things too
LINE = re.compile(r"migrate: [^:]+.*: [^;]+(; .+)?")


def refusal(result: Result) -> str:
    """The one line of a refusal, which must look like one."""
    assert result.status == REFUSED, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert LINE.fullmatch(lines[0]), lines[0]
    return lines[0]


@pytest.fixture
def counter(desk: Desk) -> Iterator[int]:
    """A process of alice's that could move; whatever the test did, it still runs here, unharmed."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    before = desk.ids(pid)
    yield pid
    desk.grows("out")
    assert desk.ids(pid) == before
    assert not any(guests_at(desk.nodes, node) for node in desk.nodes.names)
    desk.enough()
    assert shell.status() == 7
    counted = desk.count()
    assert counted.unbroken
    assert counted.ids == {before}


@contextmanager
def in_time() -> Iterator[None]:
    """What is done within takes seconds, not minutes."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SECONDS


def refused(desk: Desk, *words: str, user: str = "alice") -> str:
    """The line with which `migrate` refuses these words, soon."""
    with in_time():
        return refusal(desk.migrate(*words, user=user))


# ---------------------------------------------------------------------- processes


def test_a_pid_that_is_gone(desk: Desk) -> None:
    pid = desk.nodes.sh("node1", "true & echo $!; wait", user="alice")
    line = refused(desk, "-p", pid, "-h", "node2")
    assert line.startswith(f"migrate: pid {pid}: ")


def test_pid_1(desk: Desk) -> None:
    line = refused(desk, "-p", "1", "-h", "node2")
    assert "pid 1" in line
    assert "init" in line


def test_pid_1_for_root_too(desk: Desk) -> None:
    assert "init" in refused(desk, "-p", "1", "-h", "node2", user="root")


def test_a_kernel_thread(desk: Desk) -> None:
    threads = desk.nodes.sh("node1", "ps -e -o pid=,ppid= | awk '$2 == 2 {print $1; exit}'")
    if not threads or "kthreadd" not in desk.nodes.sh("node1", "cat /proc/2/comm"):
        pytest.skip("a node sees no kernel threads: they live in the machine's pid namespace")
    assert "kernel thread" in refused(desk, "-p", threads, "-h", "node2")


def test_somebody_elses_process(desk: Desk, counter: int) -> None:
    line = refused(desk, "-p", str(counter), "-h", "node2", user="bob")
    assert f"pid {counter}" in line
    assert "belongs to another user" in line
    assert desk.directory not in line


def test_somebody_elses_process_is_not_examined_either(desk: Desk, counter: int) -> None:
    line = refused(desk, "--check", "-p", str(counter), user="bob")
    assert "belongs to another user" in line


def test_the_shell_that_migrate_runs_in(desk: Desk) -> None:
    shell = desk.shell('migrate -p $$ -h node2 2>told; echo "status $?"; echo "pid $$"')
    assert shell.status() == REFUSED
    pid = shell.pid()
    line = desk.read("told")
    assert line.startswith(f"migrate: pid {pid} (bash): ")
    assert "migrate command itself" in line
    assert line.count("\n") == 1


def test_a_zombie(desk: Desk) -> None:
    shell = desk.shell("exec python3 zombie.py")
    (pid,) = shell.says("zombie")
    assert "zombie" in refused(desk, "-p", pid, "-h", "node2")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("1a2b", "0x1a2b"),
        ("0", "0"),
        ("-5", ""),
        ("0x", "0x1a2b"),
        ("12 34", "6699"),
        ("99999999999999999999", "limit"),
        ("", "empty"),
    ],
)
def test_what_is_no_pid(desk: Desk, word: str, hint: str) -> None:
    assert hint in refused(desk, "-p", word, "-h", "node2")


@pytest.mark.parametrize("words", [["--check"], ["--check", "-h", "node2"]])
def test_no_pid_at_all(desk: Desk, words: list[str]) -> None:
    """Without these words it is a shell that is to run elsewhere."""
    assert "-p" in refused(desk, *words)


def test_a_process_of_root(desk: Desk) -> None:
    with desk.nodes.popen("node1", ["sh", "-c", "echo $$; exec sleep 600"]) as running:
        assert running.stdout is not None
        pid = running.stdout.readline().decode().strip()
        assert "another user" in refused(desk, "-p", pid, "-h", "node2")
        refused(desk, "-p", pid, "-h", "node2", user="root")
        assert desk.state(int(pid)) == "S"
        running.terminate()


def test_a_process_that_is_just_being_moved(desk: Desk) -> None:
    """Of two moves at the same time one wins, and the other is told."""
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    moves = desk.shell(
        f"migrate -p {pid} -h node2 2>told1 & migrate -p {pid} -h node2 2>told2 & "
        'wait %1; a=$?; wait %2; echo "statuses $a $?"'
    )
    assert sorted(moves.says("statuses")) == ["0", "125"]
    told = desk.read("told1") + desk.read("told2")
    assert LINE.fullmatch(told.strip()), told
    assert guests_at(desk.nodes, "node2") == {pid}
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_guest_goes_nowhere_where_it_is_and_moves_once_at_a_time(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    assert "runs on node2 already" in refused(desk, "-p", str(pid), "-h", "node2")
    assert "belongs to alice" in refused(desk, "-p", str(pid), "-h", "node3", user="bob")
    with held(desk.nodes, "node2", "source-prepared") as holder:
        move = ["migrate", "-p", str(pid), "-h", "node3"]
        client = desk.nodes.popen("node1", move, user="alice")
        await_reached(holder, client)
        assert "is being moved already" in refused(desk, "-p", str(pid), "-h", "node1")
        let_go(holder)
        assert client.wait(SECONDS) == 0
    assert guests_at(desk.nodes, "node3") == {pid}
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


# ---------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("program", ["listener.py", "locker.py"])
def test_a_process_that_holds_what_cannot_move(desk: Desk, program: str) -> None:
    shell, pid = desk.job(f"exec python3 {program}")
    assert shell.line() == "ready"
    line = refused(desk, "-p", str(pid), "-h", "node2")
    assert f"pid {pid} (python3), fd 3 " in line
    assert {"listener.py": "listens on 127.0.0.1:", "locker.py": "lock (flock)"}[program] in line
    assert desk.state(pid) == "S"


def test_check_tells_every_obstacle_and_moves_nothing(desk: Desk) -> None:
    shell, pid = desk.job("exec python3 locker.py and-listen")
    assert shell.line() == "ready"
    with in_time():
        checked = desk.migrate("--check", "-p", str(pid))
    assert checked.status == REFUSED
    lines = checked.stderr.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert len(lines) == 2
    assert any("lock (flock)" in line for line in lines)
    assert any("listens on" in line for line in lines)
    assert desk.state(pid) == "S"


def test_check_of_what_can_move_says_so_and_moves_nothing(desk: Desk, counter: int) -> None:
    checked = desk.migrate("--check", "-p", str(counter), check=True)
    assert checked.stdout == f"{counter:#x} can move\n"


def test_a_pid_that_can_move_moves_though_another_is_refused(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    with in_time():
        told = desk.migrate("-p", "1", "-p", str(pid), "-h", "node2")
    assert told.status == REFUSED
    assert told.stderr.count("\n") == 1
    assert guests_at(desk.nodes, "node2") == {pid}
    desk.enough()
    assert shell.status() == 7


# ---------------------------------------------------------------------- hosts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-h", "node9"], "node9"),
        (["-H", "9"], "9"),
        (["-H", "-1"], ""),
        (["-h", "node2;reboot"], ""),
        (["-h", "n" * 300], ""),
        (["-h", "../etc"], ""),
        (["-h", "node1"], "node1"),
        (["-H", "1"], "node1"),
        (["-h", "node2", "-H", "2"], "-H"),
        (["-H", "two"], "two"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_a_host_that_cannot_be_meant(desk: Desk, counter: int, words: list[str], said: str) -> None:
    assert said in refused(desk, "-p", str(counter), *words)


def test_a_host_that_is_switched_off(desk: Desk, counter: int) -> None:
    desk.nodes.kill("node2")
    assert "node2" in refused(desk, "-p", str(counter), "-h", "node2")


def test_a_host_that_has_just_lost_its_network(desk: Desk, counter: int) -> None:
    # The connection with it is up and will only be found dead.
    desk.migrate("--check", "-p", str(counter), check=True)
    shell, pid = desk.job("python3 counter.py 0 >out2")
    desk.migrate("-p", str(pid), "-h", "node2", check=True)
    desk.send(pid, "KILL")
    shell.status()
    until(lambda: not guests_at(desk.nodes, "node2"), "the other guest has gone")
    desk.nodes.cut("node2")
    # Longer than other refusals: somebody has to wait for an answer first.
    told = desk.migrate("-p", str(counter), "-h", "node2")
    assert "node2" in refusal(told)


def test_no_host_at_all_that_can_be_reached(desk: Desk, counter: int) -> None:
    desk.nodes.kill("node2")
    desk.nodes.kill("node3")
    told = refused(desk, "-p", str(counter))
    # As long as a connection is not yet found dead, its host is tried.
    assert "no other host" in told or "no sign of life" in told


def test_a_host_where_migd_does_not_run(desk: Desk, counter: int) -> None:
    desk.nodes.node("node2").stop_service("migd")
    try:
        assert "node2" in refused(desk, "-p", str(counter), "-h", "node2")
    finally:
        desk.nodes.node("node2").start_service("migd")


def test_home_where_migd_does_not_run(desk: Desk, counter: int) -> None:
    desk.nodes.node("node1").stop_service("migd")
    try:
        line = refused(desk, "-p", str(counter), "-h", "node2")
        assert line.startswith("migrate: migd: ")
        assert "start it" in line
    finally:
        desk.nodes.node("node1").start_service("migd")


def test_a_host_that_takes_no_guests(desk: Desk, counter: int) -> None:
    config = "/etc/migrate/config.toml"
    before = desk.nodes.sh("node2", f"cat {config}")
    desk.nodes.sh("node2", f'printf "accept_guests = false\\n%s\\n" "$1" >{config}', before)
    try:
        desk.nodes.restart_migd("node2")
        line = refused(desk, "-p", str(counter), "-h", "node2")
        assert "node2" in line
        assert "takes no guests" in line
    finally:
        desk.nodes.sh("node2", f'printf "%s\\n" "$1" >{config}', before)
        desk.nodes.restart_migd("node2")


def test_a_host_with_too_little_memory(desk: Desk, counter: int) -> None:
    config = "/etc/migrate/config.toml"
    before = desk.nodes.sh("node2", f"cat {config}")
    setting = f"min_free_memory_bytes = {1 << 50}"
    desk.nodes.sh("node2", f'printf "{setting}\\n%s\\n" "$1" >{config}', before)
    try:
        desk.nodes.restart_migd("node2")
        line = refused(desk, "-p", str(counter), "-h", "node2")
        assert "MiB of memory free" in line
    finally:
        desk.nodes.sh("node2", f'printf "%s\\n" "$1" >{config}', before)
        desk.nodes.restart_migd("node2")


def test_a_host_where_the_user_has_no_account(desk: Desk, counter: int) -> None:
    desk.nodes.sh("node2", "cp /etc/passwd /etc/passwd.kept; sed -i /^alice:/d /etc/passwd")
    try:
        line = refused(desk, "-p", str(counter), "-h", "node2")
        assert "has no account alice" in line
    finally:
        desk.nodes.sh("node2", "mv /etc/passwd.kept /etc/passwd")


def test_a_host_where_the_users_name_is_somebody_elses(desk: Desk, counter: int) -> None:
    desk.nodes.sh(
        "node2", "cp /etc/passwd /etc/passwd.kept; sed -i s/^alice:x:1001/alice:x:1999/ /etc/passwd"
    )
    try:
        line = refused(desk, "-p", str(counter), "-h", "node2")
        assert "alice has uid 1999 there" in line
    finally:
        desk.nodes.sh("node2", "mv /etc/passwd.kept /etc/passwd")


# ---------------------------------------------------------------------- the sockets

TALK = """\
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
sock.connect("/run/migrate/migd.sock")
try:
    sock.sendall(bytes.fromhex(sys.argv[1]))
    if sys.argv[2] == "end":
        sock.shutdown(socket.SHUT_WR)
    answer = b""
    while data := sock.recv(65536):
        answer += data
except (BrokenPipeError, ConnectionResetError):
    answer = b"reset"
print(answer.decode("latin-1"))
"""

NONSENSE = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "an oversized frame": struct.pack(">I", 1 << 31) + b"x",
    "zeros": bytes(4),
    "a frame that is no message": struct.pack(">I", 5) + b"hello",
    "a message of no known kind": struct.pack(">I", 15) + b"\x81\xa4type\xa8shutdown"[:15],
    "a list nested without end": struct.pack(">I", 60000) + b"\x91" * 60000,
    "many bytes": bytes(range(256)) * 4096,
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_on_the_users_socket_harms_nobody(desk: Desk, counter: int, what: str) -> None:
    before = desk.nodes.node("node1").service_states()
    with in_time():
        said = desk.nodes.exec(
            "node1", ["python3", "-c", TALK, NONSENSE[what][:60000].hex(), "end"], user="alice"
        )
    assert said.stdout
    assert desk.nodes.node("node1").service_states() == before
    desk.migrate("--check", "-p", str(counter), check=True)


def test_half_a_message_is_given_up_after_a_while(desk: Desk, counter: int) -> None:
    half = struct.pack(">I", 100) + b"half"
    with in_time():
        desk.nodes.exec("node1", ["python3", "-c", TALK, half.hex(), "stay"], user="alice")
    desk.migrate("--check", "-p", str(counter), check=True)


def test_one_user_cannot_keep_others_out_with_idle_connections(desk: Desk, counter: int) -> None:
    flood = (
        "import socket, time\n"
        "held = [socket.socket(socket.AF_UNIX) for _ in range(300)]\n"
        "for sock in held: sock.connect('/run/migrate/migd.sock')\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with desk.nodes.popen("node1", ["python3", "-c", flood], user="bob") as flooding:
        assert flooding.stdout is not None
        assert flooding.stdout.readline() == b"ready\n"
        with in_time():
            desk.migrate("--check", "-p", str(counter), check=True)
        flooding.terminate()


def test_the_peer_socket_is_closed_to_users(nodes: Nodes) -> None:
    connect = (
        "import errno, socket\n"
        "try: socket.socket(socket.AF_UNIX).connect('/run/migrate/peer.sock')\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    for user in ("alice", "bob"):
        assert nodes.exec("node1", ["python3", "-c", connect], user=user).stdout == "EACCES\n"


@pytest.mark.parametrize(
    "path", ["/run/migrate/guests", "/etc/migrate/ssh", "/var/lib/migrate/journal.db"]
)
def test_what_is_roots_is_closed_to_users(nodes: Nodes, path: str) -> None:
    nodes.exec("node1", ["test", "-e", path])
    for user in ("alice", "bob"):
        command = ["sh", "-c", 'if [ -f "$1" ]; then cat "$1"; else ls "$1"; fi', "sh", path]
        tried = nodes.exec("node1", command, user=user, check=False)
        assert tried.status != 0
        assert tried.stdout == ""
        assert "Permission denied" in tried.stderr
