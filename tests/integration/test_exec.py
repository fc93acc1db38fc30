"""`migrate COMMAND`: it runs elsewhere as if it ran here."""

from __future__ import annotations

import pytest
from moving import Desk, guests_at, until

STATUSES = {
    "exit 0": 0,
    "exit 1": 1,
    "exit 255": 255,
    "kill -TERM $$": 128 + 15,
    "kill -KILL $$": 128 + 9,
}


def said(desk: Desk, script: str) -> list[str]:
    """All lines that a script of alice's says, which must end well."""
    shell = desk.shell(script)
    lines = shell.rest()
    assert shell.wait() == 0
    return lines


@pytest.mark.parametrize("ending", STATUSES)
def test_it_ends_as_the_command_ends(desk: Desk, ending: str) -> None:
    lines = said(desk, f"migrate -h node2 sh -c '{ending}' </dev/null; echo $?")
    assert lines == [str(STATUSES[ending])]


def test_output_goes_where_the_commands_goes(desk: Desk) -> None:
    command = "migrate -h node2 sh -c 'echo one; echo two >&2; echo three' </dev/null"
    said(desk, f"{command} >out 2>err; {command} >both 2>&1; {command} 2>/dev/null | cat >piped")
    assert desk.read("out") == desk.read("piped") == "one\nthree\n"
    assert desk.read("err") == "two\n"
    assert desk.read("both") == "one\ntwo\nthree\n"


@pytest.mark.parametrize("stdin", ["<lines", "<<<$(cat lines)", "< <(cat lines)"])
def test_a_command_takes_no_more_of_its_input_than_it_reads(desk: Desk, stdin: str) -> None:
    desk.write("lines", "a\nb\nc\n")
    script = f"{{ migrate -h node2 sh -c 'read x; echo it $x'; cat; }} {stdin}"
    assert said(desk, script) == ["it a", "b", "c"]


def test_it_is_the_users_own_process_in_her_own_world(desk: Desk) -> None:
    asked = "id; pwd; umask; ulimit -n; nice; echo $COLOUR; hostname; echo $$"
    lines = said(
        desk,
        "umask 027; ulimit -S -n 500; export COLOUR=green; renice -n 3 $$ >/dev/null\n"
        f"({asked}) >local; migrate -h node2 sh -c '{asked}' >there </dev/null & wait $!; echo $!",
    )
    *here, _ = desk.read("local").splitlines()
    *there, pid = desk.read("there").splitlines()
    assert there == here
    assert [pid] == lines


def test_it_is_listed_and_can_be_moved_on(desk: Desk) -> None:
    shell, pid = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out")
    desk.grows("out")
    assert guests_at(desk.nodes, "node2") == {pid}
    listed = desk.nodes.exec("node1", ["migctl", "ps"], user="alice").stdout
    assert f"{pid:#x}" in listed
    assert "counter.py" in listed
    for host in ("node3", "node1", "node2"):
        desk.move(pid, host)
        desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_signals_reach_it_and_killing_the_deputy_kills_it(desk: Desk) -> None:
    shell, pid = desk.job("migrate -h node2 sleep 100 </dev/null")
    until(lambda: guests_at(desk.nodes, "node2") == {pid}, "it runs")
    desk.send(pid, "INT")  # which a job in the background of a script ignores, here as there
    desk.send(pid, "USR1")
    assert shell.status() == 128 + 10
    shell, pid = desk.job("migrate -h node2 sleep 100 </dev/null")
    until(lambda: guests_at(desk.nodes, "node2") == {pid}, "it runs")
    desk.send(pid, "KILL")
    assert shell.status() == 128 + 9
    until(lambda: not guests_at(desk.nodes, "node2"), "it is dead")


FAILURES = {
    "no such host": ("-h node9 true", 125, "migrate: host node9: not configured here"),
    "no such command": ("-h node2 nonesuch", 127, "migrate: nonesuch: command not found"),
    "no such file": ("-h node2 ./nonesuch", 127, "migrate: ./nonesuch: no such file"),
    "no program": ("-h node2 ./counter.py", 126, "migrate: ./counter.py: Permission denied"),
    "a directory": ("-h node2 /tmp", 126, "migrate: /tmp: is a directory"),
    "another machine's": (
        "-h node2 ./alien",
        126,
        "migrate: ./alien: cannot be executed: a program",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_cannot_be_run_is_one_line_and_its_code(desk: Desk, failure: str) -> None:
    words, status, line = FAILURES[failure]
    said(desk, r"printf '\177ELF\2\1\1\0\0\0\0\0\0\0\0\0\2\0\363\0' >alien; chmod +x alien")
    lines = said(desk, f"migrate {words} 2>&1 </dev/null; echo $?")
    assert len(lines) == 2
    assert lines[0].startswith(line)
    assert lines[1] == str(status)
