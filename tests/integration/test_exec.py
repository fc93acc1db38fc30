"""`migrate COMMAND`: it runs elsewhere as if it ran here."""

from __future__ import annotations

import pytest
from moving import Count, Desk, guests_at, until

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


def test_every_limit_is_homes(desk: Desk) -> None:
    asked = "ulimit -Sa; ulimit -Ha"
    lines = said(
        desk,
        "ulimit -c 0; ulimit -S -s 4096; ulimit -t 1000; ulimit -f 200000; ulimit -v 4000000\n"
        f"bash -c '{asked}' >local; migrate -h node2 bash -c '{asked}' </dev/null >there\n"
        "diff local there && echo same",
    )
    assert lines == ["same"]


def test_nobody_gains_rights(desk: Desk) -> None:
    """Neither by a set-user-ID program of home's, nor by one of the host's."""
    program = f"{desk.directory}/who"
    desk.nodes.sh(desk.home, f"cp /usr/bin/id {program}; chmod 6755 {program}")
    assert desk.nodes.sh(desk.home, f"{program} -nu", user=desk.user) == "root"
    asked = "./who; id; grep -e ^Cap -e ^NoNewPrivs /proc/self/status; su -c id root </dev/null"
    said(
        desk,
        "(id; id; grep -e ^Cap -e ^NoNewPrivs /proc/self/status) >local\n"
        f"migrate -h node2 sh -c '{asked}' >there 2>told </dev/null; true",
    )
    assert desk.read("there") == desk.read("local")
    assert "uid=0" not in desk.read("there")


def test_it_is_listed_and_can_be_moved_on(desk: Desk) -> None:
    shell, pid = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out")
    desk.grows("out")
    until(lambda: guests_at(desk.nodes, "node2") == {pid}, "it runs")
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


ACCOUNTS = {
    "/^alice:/d": "has no account alice",
    "s/^alice:x:1001/alice:x:1999/": "uid 1999 there, but 1001 at home",
}


@pytest.mark.parametrize("change", ACCOUNTS)
def test_a_host_where_the_user_is_not_known(desk: Desk, change: str) -> None:
    desk.nodes.sh("node2", 'cp /etc/passwd /etc/passwd.kept; sed -i "$1" /etc/passwd', change)
    try:
        lines = said(desk, "migrate -h node2 true 2>&1 </dev/null; echo $?")
    finally:
        desk.nodes.sh("node2", "mv /etc/passwd.kept /etc/passwd")
    assert len(lines) == 2
    assert ACCOUNTS[change] in lines[0]
    assert lines[1] == "125"


def test_a_working_directory_that_is_gone(desk: Desk) -> None:
    lines = said(desk, "mkdir gone; cd gone; rmdir ../gone; migrate -h node2 true 2>&1; echo $?")
    assert lines == ["migrate: working directory: does not exist any more; cd to another", "125"]


def test_programs_and_directories_that_only_home_has(desk: Desk) -> None:
    lines = said(
        desk,
        "mkdir -p only/here; cd only/here; cp /bin/sh mine; printf '#!./mine\\necho script $0 at $PWD' >it\n"
        "chmod +x it; migrate -h node2 ./it </dev/null; PATH=$PWD:$PATH migrate -h node2 it </dev/null",
    )
    assert lines == [
        f"script ./it at {desk.directory}/only/here",
        f"script {desk.directory}/only/here/it at {desk.directory}/only/here",
    ]


# ---------------------------------------------------------------------- options


def test_the_options_end_at_the_first_word(desk: Desk) -> None:
    assert said(desk, "migrate -h node2 echo -h node3 -v --check -p 1 -- x </dev/null") == [
        "-h node3 -v --check -p 1 -- x"
    ]


@pytest.mark.parametrize("option", ["-h node3", "-hnode3", "-H 3", "-vh node3"])
def test_a_host_is_named_or_numbered(desk: Desk, option: str) -> None:
    assert said(desk, f"migrate {option} printenv MIGRATE_HOST </dev/null") == ["node3"]


def test_without_a_name_a_host_is_chosen(desk: Desk) -> None:
    (chosen,) = said(desk, "migrate printenv MIGRATE_HOST </dev/null")
    assert chosen in ("node2", "node3")


def test_the_own_host_runs_it_without_ado(desk: Desk) -> None:
    script = "migrate -v -h node1 sh -c 'echo it $MIGRATE_HOST' 2>&1 </dev/null; echo $?"
    assert said(desk, script) == ["migrate: running on node1, which is this host", "it", "0"]


def test_verbose_says_which_host_and_debug_shows_the_steps(desk: Desk) -> None:
    assert said(desk, "migrate -v -h node2 true 2>&1 </dev/null") == ["migrate: running on node2"]
    steps = said(desk, "migrate -D -h node2 true 2>&1 </dev/null")
    assert [line.rpartition(" (")[0] for line in steps] == [
        "migrate: node2 has accepted",
        "migrate: the guard stands",
        "migrate: connected with the keeper",
        "migrate: the capsule stands",
    ]


def test_with_l_it_runs_here_if_it_cannot_run_there(desk: Desk) -> None:
    command = "sh -c 'echo it ran $MIGRATE_HOST; exit 4' </dev/null"
    shell = desk.shell(
        f"migrate -l -h node9 {command}; echo $?; migrate -h node9 {command}; echo $?"
    )
    assert shell.rest() == ["it ran", "4", "125"]


def test_in_the_background_its_pid_is_told_and_it_outlives_the_shell(desk: Desk) -> None:
    shell = desk.shell("migrate -b -h node2 python3 counter.py 7 >out </dev/null; echo over >ended")
    until(lambda: desk.read("ended"), "the shell has ended")
    assert shell.wait() == 0
    told = desk.read("out").splitlines()[0]
    pid = int(told, 16)
    assert told == f"{pid:#x}"
    until(lambda: guests_at(desk.nodes, "node2") == {pid}, "it runs")
    assert desk.ids(pid).split()[1:] == ["1", str(pid), str(pid)]
    desk.move(pid, "node3")
    desk.enough()
    until(lambda: desk.read("out").endswith("enough\n"), "it has ended")
    counted = Count.of(desk.read("out").partition("\n")[2])
    assert counted.unbroken
    assert counted.ids == {f"{pid} 1 {pid} {pid}"}


def test_what_cannot_begin_in_the_background_is_told_at_once(desk: Desk) -> None:
    lines = said(desk, "migrate -b -h node9 true 2>&1 </dev/null; echo $?")
    assert lines[0].startswith("migrate: host node9: not configured here")
    assert lines[1:] == ["125"]


def test_background_priority_is_the_lowest(desk: Desk) -> None:
    lines = said(desk, "migrate -B -h node2 sh -c 'nice; chrt -p $$; ionice' </dev/null")
    assert lines[0] == "19"
    assert lines[1].endswith("SCHED_BATCH")
    assert lines[-1] == "idle"


def test_the_file_and_its_name_may_differ(desk: Desk) -> None:
    script = "migrate -h node2 -E /bin/sh odd -c 'echo $0' </dev/null"
    assert said(desk, script) == ["odd"]


def test_a_script_without_a_first_line_is_run_by_sh(desk: Desk) -> None:
    desk.write("script", 'echo "$0" "$@"\nexit 6\n')
    script = "chmod +x script; migrate -h node2 ./script a 'b c' </dev/null; echo $?"
    assert said(desk, script) == ["./script a b c", "6"]


# ---------------------------------------------------------------------- streams


STDIN = {"pipe": "cat lines |", "file": "<lines", "null": "</dev/null", "closed": "<&-"}
OUTPUT = {"pipe": "> >(cat >{0})", "file": ">{0}", "append": ">>{0}", "null": ">/dev/null"}


@pytest.mark.parametrize("stderr", OUTPUT)
@pytest.mark.parametrize("stdout", OUTPUT)
@pytest.mark.parametrize("stdin", STDIN)
def test_every_kind_of_stdio(desk: Desk, stdin: str, stdout: str, stderr: str) -> None:
    desk.write("lines", "a\nb\n")
    out, err = OUTPUT[stdout].format("out"), "2" + OUTPUT[stderr].format("err")
    inner = "migrate -h node2 sh -c 'cat; echo told >&2; exit 3'"
    before, after = (STDIN[stdin], "") if stdin == "pipe" else ("", STDIN[stdin])
    said(desk, f"set -o pipefail; {before} {inner} {after} {out} {err}; echo $? >status")
    assert desk.read("status") == "3\n"
    wanted = "a\nb\n" if stdin in ("pipe", "file") else ""
    expected = {
        "out": "" if stdout == "null" else wanted,
        "err": "" if stderr == "null" else "told\n",
    }
    until(
        lambda: {name: desk.read(name) for name in expected} == expected,
        f"all is there: {expected}",
    )


def test_a_hundred_megabytes_both_ways(desk: Desk) -> None:
    lines = said(
        desk,
        "head -c 100M /dev/urandom >data; sha256sum <data\n"
        "cat data | migrate -h node2 cat | sha256sum\n"
        "migrate -h node2 cat <data | sha256sum\n"
        "cat data | migrate -h node2 sha256sum; rm data",
    )
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_who_reads_no_more_ends_the_writer(desk: Desk) -> None:
    lines = said(desk, "migrate -h node2 yes </dev/null | head -2; echo ${PIPESTATUS[0]}")
    assert lines == ["y", "y", str(128 + 13)]
    assert said(desk, "yes | migrate -h node2 head -1; echo ${PIPESTATUS[*]}") == ["y", "141 0"]


def test_it_may_begin_when_nobody_reads_its_output_any_more(desk: Desk) -> None:
    gone = "trap '' PIPE; while echo; do :; done 2>/dev/null; trap - PIPE"
    command = "migrate -h node2 sh -c 'echo unheard; exit 3' </dev/null 2>told"
    said(desk, f"({gone}; {command}; echo $? >status) | true")
    assert desk.read("status") == f"{128 + 13}\n"
    assert desk.read("told") == ""


def test_a_build_is_moved_twice(desk: Desk) -> None:
    desk.write(
        "build", "for i in $(seq 60); do (sleep 0.05; echo $i | sha1sum >>sums) & wait; done\n"
    )
    shell, pid = desk.job("migrate -h node2 sh build </dev/null")
    desk.grows("sums", 5)
    desk.move(pid, "node3")
    desk.grows("sums", 5)
    desk.move(pid, "node2")
    assert shell.status() == 0
    said(desk, "for i in $(seq 60); do echo $i | sha1sum; done >expected")
    assert desk.read("sums") == desk.read("expected")


# ---------------------------------------------------------------------- ends


INTERRUPTER = """
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execvp("sh", ["sh", "-c", "migrate -h node2 sh -c 'echo up; sleep 100; echo never' </dev/null"])
while b"up" not in os.read(terminal, 1000):
    pass
os.write(terminal, b"\\x03")
print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_an_interrupt_from_the_terminal_is_for_the_commands_children_too(desk: Desk) -> None:
    desk.write("interrupter.py", INTERRUPTER)
    assert said(desk, "python3 interrupter.py") == ["status -2"]


def test_a_client_killed_before_its_command_began_leaves_nothing(desk: Desk) -> None:
    for step in range(4):
        shell, pid = desk.job(f"migrate -D -h node2 sleep 100 </dev/null 2>steps{step}")
        until(lambda step=step: desk.lines(f"steps{step}") >= step, f"step {step} is done")
        desk.send(pid, "KILL")
        assert shell.status() == 128 + 9


def test_a_command_outlives_the_daemons(desk: Desk) -> None:
    shell, pid = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out")
    desk.grows("out")
    desk.nodes.crash_migd("node1")
    desk.nodes.crash_migd("node2")
    desk.grows("out")
    until(lambda: desk.migrate("-p", str(pid), "-h", "node3").status == 0, "it moves")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_a_cut_is_told_once_and_waited_for(desk: Desk) -> None:
    shell, pid = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out 2>err")
    desk.grows("out")
    desk.nodes.cut("node2")
    until(lambda: desk.read("err"), "the cut is told")
    desk.nodes.heal("node2")
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken
    assert desk.read("err") == "migrate: host node2: cut off; waiting for it\n"
    assert pid


def test_a_lost_host_ends_it_as_if_killed_and_says_so(desk: Desk) -> None:
    shell, _ = desk.job("migrate -h node2 python3 counter.py 7 </dev/null >out 2>err")
    desk.grows("out")
    desk.nodes.kill("node2")
    desk.nodes.boot("node2")
    assert shell.status() == 128 + 9
    lines = [line for line in desk.read("err").splitlines() if "cut off" not in line]
    assert lines == ["migrate: host node2: is lost, and the command with it"]


# ---------------------------------------------------------------------- many and others


def test_two_users_at_once_see_nothing_of_each_other(desk: Desk) -> None:
    nodes = desk.nodes
    shell, pid = desk.job(
        "migrate -h node2 sh -c 'echo mine >/tmp/secret; exec sleep 100' </dev/null"
    )
    until(lambda: guests_at(nodes, "node2") == {pid}, "hers runs")
    script = (
        'cd; migrate -h node2 sh -c "whoami; ps -e -o user=; cat $1/counter.py" </dev/null 2>&1'
    )
    nodes.sh("node1", 'chmod 700 "$1"', desk.directory)
    told = nodes.sh("node1", script, desk.directory, user="bob", check=False).splitlines()
    assert told[0] == "bob"
    assert "Permission denied" in told[-1]
    assert "alice" not in told[1:-1]
    refused = nodes.exec(
        "node1", ["migrate", "-p", str(pid), "-h", "node3"], user="bob", check=False
    )
    assert refused.status == 125
    desk.send(pid, "TERM")
    assert shell.status() == 128 + 15


@pytest.mark.timeout(900)
def test_two_hundred_in_a_row_and_fifty_at_once_leave_nothing(desk: Desk) -> None:
    one = "migrate -h node2 sh -c 'exit 3' </dev/null; test $? = 3 || echo wrong"
    fifty = f"for i in $(seq 50); do ({one}) & done; wait"

    def cost() -> list[tuple[int, int]]:
        return [usage(desk, node) for node in ("node1", "node2")]

    for _ in range(2):  # as much at once as ever: what an allocator keeps, it has then
        assert said(desk, fifty) == []
    before = cost()
    shell = desk.shell(f"for i in $(seq 200); do {one}; done")
    assert shell.line(600) == ""
    assert said(desk, fifty) == []
    until(lambda: not guests_at(desk.nodes, "node2"), "all have ended")
    for (fds, kib), (fds_after, kib_after) in zip(before, cost(), strict=True):
        assert fds_after <= fds + 8  # connections that are kept ready, or not yet again
        assert kib_after <= kib + 4096


def usage(desk: Desk, node: str) -> tuple[int, int]:
    """Descriptors and resident KiB of a node's migd."""
    script = (
        "pid=$(pgrep -o -f 'python3 /usr/local/bin/migd'); ls /proc/$pid/fd | wc -l\n"
        "awk '/VmRSS/ {print $2}' /proc/$pid/status"
    )
    fds, kib = desk.nodes.sh(node, script).split()
    return int(fds), int(kib)
