"""A program in a terminal behaves as if it had never been moved."""

import pytest
from moving import Desk, guests_at, until
from terminals import Terminal, terminal

ROUTES = {
    "one hop": ["node2"],
    "two hops": ["node2", "node3"],
    "there and home": ["node2", "node1"],
}

SLEEPER = r"""
import os, sys, time
print("pid", os.getpid(), flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
print("going", flush=True)
line = sys.stdin.readline()
print("got", repr(line), flush=True)
"""

SIZER = r"""
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print("pid", os.getpid(), flush=True)
while True:
    signal.sigwait([signal.SIGWINCH])
    print("size", *os.get_terminal_size(0), flush=True)
"""

MODE_SETTER = r"""
import os, sys, termios
print("pid", os.getpid(), flush=True)
sys.stdin.readline()
mode = termios.tcgetattr(0)
mode[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, mode)
print("set", flush=True)
"""

LOSER = r"""
import os, signal, sys
def hang_up(*_):
    with open("hung", "w") as file:
        file.write("up\n")
    os._exit(1)
signal.signal(signal.SIGHUP, hang_up)
print("pid", os.getpid(), flush=True)
while True:
    signal.pause()
"""

TICKER = r"""
import os, time
print("pid", os.getpid(), flush=True)
while not os.path.exists("enough"):
    print("tick", flush=True)
    time.sleep(0.05)
"""

PRODUCER = r"""
import os, sys, time
print("pid", os.getpid(), file=sys.stderr, flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
for number in range(1, 201):
    print("line", number)
"""

ECHOER = r"""
import os, signal, sys, time
print("pid", os.getpid(), flush=True)
while True:
    line = sys.stdin.readline()
    if not line:
        print("the end", flush=True)
        break
    print("got", repr(line), flush=True)
"""


def start(desk: Desk, user: Terminal, name: str, program: str, *, command: str = "") -> int:
    """Run a program in the foreground; :return: its pid, which it tells."""
    desk.write(name, program)
    user.keys((command or f"python3 {name}") + "\n")
    return int(user.expect(r"pid (\d+)\r\n")[1])


def go(desk: Desk, pid: int, route: str) -> None:
    """Along a route."""
    for host in ROUTES[route]:
        desk.move(pid, host)


@pytest.mark.parametrize("route", ROUTES)
def test_lines_are_edited_and_echoed(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "echoer.py", ECHOER)
        go(desk, pid, route)
        user.keys("helloo")
        user.press("Backspace")
        user.keys("\n")
        user.expect("helloo\x08 \x08\r\ngot 'hello\\\\n'\r\n")
        user.keys("again\n")
        user.expect("again\r\ngot 'again\\\\n'\r\n")
        user.press("^D")
        user.expect("the end\r\n")
        user.prompt()
        assert user.run("echo $?") == "0\n"


@pytest.mark.parametrize("route", ROUTES)
def test_the_interrupt_key_kills_it(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "echoer.py", SIZER)
        go(desk, pid, route)
        user.press("^C")
        user.prompt()
        assert user.run("echo $?") == "130\n"


@pytest.mark.parametrize("route", ROUTES)
def test_it_stops_by_key_and_goes_on_in_the_foreground(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "echoer.py", ECHOER)
        go(desk, pid, route)
        user.keys("one\n")
        user.expect("got 'one\\\\n'\r\n")
        user.press("^Z")
        user.expect(r"\^Z\r\n\[1\]\+  Stopped")
        user.prompt()
        assert user.run("echo here") == "here\n"
        user.keys("fg\n")
        user.expect("python3 echoer.py\r\n")
        user.keys("two\n")
        user.expect("two\r\ngot 'two\\\\n'\r\n")
        user.press("^D")
        user.expect("the end\r\n")
        user.prompt()


def test_it_goes_on_in_the_background_and_comes_back(desk: Desk) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "ticker.py", TICKER)
        desk.move(pid, "node2")
        user.press("^Z")
        user.expect("Stopped")
        user.prompt()
        user.keys("bg\n")
        user.expect("tick\r\n")
        user.expect("tick\r\n")
        user.keys("echo he''re\n")
        user.expect("here\r\n")
        user.expect("tick\r\n")
        user.keys("fg\n")
        user.expect("python3 ticker.py\r\n")
        user.expect("tick\r\n")
        user.press("^C")
        user.expect("KeyboardInterrupt")
        user.prompt()


@pytest.mark.parametrize("route", ROUTES)
def test_a_background_job_that_reads_is_stopped(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "sleeper.py", SLEEPER, command="python3 sleeper.py &")
        go(desk, pid, route)
        desk.write("go")
        user.expect("going\r\n")
        until(lambda: desk.state(pid) == "T", "it is stopped")
        assert "Stopped" in user.run("jobs")
        user.keys("fg\n")
        user.expect("python3 sleeper.py\r\n")
        user.keys("hello\n")
        user.expect("got 'hello\\\\n'\r\n")
        user.prompt()


def test_it_is_told_of_a_new_size(desk: Desk) -> None:
    with terminal(desk) as user:
        name = user.run("tty").strip()
        pid = start(desk, user, "sizer.py", SIZER)
        for host, rows in (("node2", 30), ("node3", 31), ("node1", 32)):
            desk.move(pid, host)
            desk.nodes.exec(
                "node1", ["stty", "-F", name, "rows", str(rows), "cols", "100"], user="alice"
            )
            user.expect(f"size 100 {rows}\r\n")
        user.press("^C")
        user.prompt()


def test_the_mode_that_it_leaves_is_the_terminals(desk: Desk) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "setter.py", MODE_SETTER)
        desk.move(pid, "node2")
        user.keys("\n")
        user.expect("set\r\n")
        user.prompt()
        user.keys("stty -a\n")
        user.expect(r"[^-]icanon")
        user.expect(r" -echo ")
        user.prompt()


@pytest.mark.parametrize("route", ROUTES)
def test_it_hears_that_the_terminal_is_closed(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "loser.py", LOSER)
        go(desk, pid, route)
    until(lambda: desk.read("hung"), "the guest had SIGHUP")
    until(lambda: not guests_at(desk.nodes, ROUTES[route][-1]), "it is gone")


def test_what_is_typed_ahead_is_the_shells(desk: Desk) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "ticker.py", TICKER)
        desk.move(pid, "node2")
        user.keys("echo typed; echo ahe")
        user.expect("ahe")
        user.keys("ad\necho mo")
        user.expect("echo mo")
        desk.enough()
        user.expect("typed\r\nahead\r\n")
        user.prompt()
        user.keys("re\n")
        user.expect("more\r\n")
        user.prompt()


def test_keys_that_wait_go_along_on_each_hop(desk: Desk) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "sleeper.py", SLEEPER)
        user.keys("on")
        user.expect("on")
        desk.move(pid, "node2")
        user.keys("ee")
        user.expect("ee")
        desk.move(pid, "node3")
        user.press("Backspace")
        user.keys(" tw")
        user.expect("tw")
        desk.move(pid, "node1")
        user.keys("o\n")
        desk.write("go")
        user.expect("got 'one two\\\\n'\r\n")
        user.prompt()


def test_the_keys_stay_the_readers_of_its_output(desk: Desk) -> None:
    with terminal(desk) as user:
        pid = start(desk, user, "producer.py", PRODUCER, command="python3 producer.py | less")
        desk.move(pid, "node2")
        desk.write("go")
        user.expect("line 23")
        user.keys(" ")
        user.expect("line 46")
        user.keys("G")
        user.expect("line 200")
        user.keys("q")
        user.prompt()


@pytest.mark.parametrize("route", ROUTES)
def test_an_editor(desk: Desk, route: str) -> None:
    with terminal(desk) as user:
        user.keys("sh -c 'echo pid $$; exec vi text'\n")
        pid = int(user.expect(r"pid (\d+)\r\n")[1])
        user.expect("text")
        user.keys("ione\n")
        user.expect("one")
        go(desk, pid, route)
        user.keys("two\n")
        user.expect("two")
        user.press("Esc")
        user.keys(":wq\n")
        user.prompt()
        assert desk.read("text").splitlines()[:2] == ["one", "two"]
        assert user.run("echo $?") == "0\n"
