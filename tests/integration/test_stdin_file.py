"""A regular file as stdin, shared with the next program of the script: that one begins where the guest ended."""

from moving import Desk

TAKER = """\
'''Copies its stdin to stdout in pieces of 1000 bytes, unbuffered, until the file `enough` is here.'''
import os, time

while not os.path.exists("enough"):
    os.write(1, os.read(0, 1000))
    time.sleep(0.002)
"""
LINES = 3_000_000


def test_the_next_program_reads_on_where_the_guest_has_ended(desk: Desk) -> None:
    desk.write("taker.py", TAKER)
    desk.nodes.sh("node1", f'cd "$1" && seq {LINES} >big', desk.directory, user="alice")
    shell = desk.shell(
        "exec <big; python3 taker.py <&0 >first & pid=$!; echo pid $pid; wait $pid; echo status $?;"
        " cat >rest; echo rest"
    )
    pid = shell.pid()
    desk.grows("first")
    desk.move(pid, "node2")
    desk.grows("first")
    desk.move(pid, "node3")
    desk.grows("first")
    desk.enough()
    assert shell.status() == 0
    shell.says("rest")
    assert desk.nodes.sh("node1", 'cd "$1" && cat first rest | cmp - big', desk.directory) == ""
    assert desk.path("first").stat().st_size > 0
    assert desk.path("rest").stat().st_size > 0
