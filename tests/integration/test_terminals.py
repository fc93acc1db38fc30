"""A program in a terminal behaves as if it had never been moved."""

import pytest
from moving import Desk
from terminals import Terminal, terminal

ROUTES = {
    "one hop": ["node2"],
    "two hops": ["node2", "node3"],
    "there and home": ["node2", "node1"],
}

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
