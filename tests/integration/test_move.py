"""A process moves, and nobody at home notices: output, identity, signals' end, files, exit status."""

import hashlib
import threading

import pytest
from moving import Count, Desk, answer, guest_pids, guests_at, until

OUTPUTS = {
    "a file": ">out",
    "a file opened for appending": ">>out",
    "a pipe": "> >(cat >out)",
}
ROUTES = {
    "one hop": ["node2"],
    "two hops": ["node2", "node3"],
    "there and home": ["node2", "node1"],
    "home and away again": ["node2", "node3", "node1", "node2"],
}


def finished(desk: Desk) -> Count:
    """What counter.py said, all of it."""
    until(lambda: desk.read("out").endswith("enough\n"), "the output is complete")
    return desk.count()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("route", ROUTES)
def test_output_goes_on_unbroken_and_the_shell_gets_the_exit_status(
    desk: Desk, route: str, output: str
) -> None:
    shell, pid = desk.job(f"python3 counter.py 7 {OUTPUTS[output]}")
    for host in ROUTES[route]:
        desk.grows("out")
        desk.move(pid, host)
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    counted = finished(desk)
    assert counted.unbroken
    assert counted.words == ["enough"]


def test_each_step_of_each_move_is_shown(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    for host in ("node2", "node3", "node1", "node2"):
        told = desk.migrate("-D", "-p", str(pid), "-h", host, check=True).stderr.splitlines()
        steps = [line.removeprefix(f"{pid:#x}: ").split(" (")[0] for line in told]
        # The last ones of a hop may be overtaken by the guest itself.
        assert steps.index("prepared") < steps.index("frozen")
        desk.grows("out")
    desk.enough()
    assert shell.status() == 7


@pytest.mark.parametrize("shell_options", ["+m", "-m"], ids=["shell's group", "own group"])
@pytest.mark.parametrize("route", ["one hop", "there and home"])
def test_pid_parent_group_and_session_stay_for_itself_and_for_others(
    desk: Desk, route: str, shell_options: str
) -> None:
    shell = desk.shell(
        f"set {shell_options}; python3 counter.py 7 >out &\n"
        'echo "pid $!"; wait $!; echo "status $?"'
    )
    pid = shell.pid()
    before = desk.ids(pid)
    desk.grows("out")
    for host in ROUTES[route]:
        desk.move(pid, host)
        assert desk.ids(pid) == before
        desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert finished(desk).ids == {before}


def test_a_leader_of_its_session_stays_one(desk: Desk) -> None:
    shell, pid = desk.job("setsid python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    ids = finished(desk).ids
    assert len(ids) == 1
    seen_pid, _, group, session = ids.pop().split()
    assert seen_pid == group == session == str(pid)


def test_a_process_without_a_living_parent_moves_and_ends(desk: Desk) -> None:
    shell = desk.shell('(python3 counter.py 7 >out & echo "pid $!")')
    pid = shell.pid()
    assert shell.rest() == []
    until(lambda: desk.ids(pid).split()[1] == "1", "init is its parent")
    desk.grows("out")
    desk.move(pid, "node2")
    desk.grows("out")
    desk.enough()
    assert finished(desk).unbroken
    until(lambda: not desk.state(pid), "it has gone from home")


def test_the_member_in_the_middle_of_a_pipeline_moves(desk: Desk) -> None:
    last = 60000
    wanted = hashlib.md5("".join(f"{n}\n" for n in range(1, last + 1)).encode()).hexdigest()
    shell = desk.shell(
        f"seq {last} | sh -c 'echo \"pid $$\" >&2; exec python3 copier.py' 2>told | sort -n"
        ' | md5sum; echo "status ${PIPESTATUS[*]}"'
    )
    pid = int(until(lambda: desk.read("told"), "the pid is told").split()[1])
    desk.move(pid, "node2")
    assert shell.line() == f"{wanted}  -"
    assert shell.says("status") == ["0", "0", "0", "0"]


def test_a_guest_whose_reader_leaves_dies_of_it_as_at_home(desk: Desk) -> None:
    shell = desk.shell(
        "mkfifo go\n"
        "sh -c 'echo $$ >pid; exec python3 counter.py 7' | { read line; read line <go; }\n"
        'echo "status ${PIPESTATUS[0]}"'
    )
    pid = int(until(lambda: desk.read("pid"), "the pid is told"))
    desk.move(pid, "node2")
    desk.tell("go")
    # Python ignores SIGPIPE and ends with an OSError.
    assert shell.status() == 1


def test_a_guest_gets_what_is_sent_after_the_move_and_then_the_end_of_it(desk: Desk) -> None:
    shell = desk.shell(
        "mkfifo go end\n"
        "{ echo 1; read line <go; echo 2; read line <end; } |\n"
        "  { sh -c 'echo $$ >pid; exec cat'; echo \"status $?\"; }"
    )
    assert shell.line() == "1"
    desk.move(int(desk.read("pid")), "node2")
    desk.tell("go")
    assert shell.line() == "2"
    desk.tell("end")
    assert shell.status() == 0


def test_standard_input_is_not_read_ahead_of_the_guest(desk: Desk) -> None:
    """`while read` in a shell, and a guest that takes one line: the other lines are the shell's."""
    shell = desk.shell(
        "mkfifo go\n"
        "{ echo 1; read line <go; echo 2; echo 3; } | {\n"
        "  sh -c 'echo $$ >pid; read a; echo \"guest $a\"; while [ ! -e enough ]; do sleep 0.05; done'\n"
        '  while read line; do echo "shell $line"; done\n}'
    )
    assert shell.says("guest") == ["1"]
    desk.move(int(desk.read("pid")), "node2")
    desk.tell("go")
    desk.enough()
    assert shell.says("shell") == ["2"]
    assert shell.says("shell") == ["3"]


def test_the_next_program_writes_after_the_guest_in_a_file_that_they_share(desk: Desk) -> None:
    shell = desk.shell(
        "(sh -c 'echo $$ >pid; exec python3 counter.py 0'; echo \"after $?\") >out; echo done"
    )
    desk.grows("out")
    desk.move(int(desk.read("pid")), "node2")
    desk.grows("out")
    desk.enough()
    assert shell.line() == "done"
    counted = desk.count()
    assert counted.unbroken
    assert counted.words == ["enough", "after 0"]
    assert "\0" not in desk.read("out")


@pytest.mark.parametrize("route", ["one hop", "two hops"])
def test_a_log_that_others_at_home_append_to_loses_no_line(desk: Desk, route: str) -> None:
    shell, pid = desk.job("python3 logger.py guest")
    other, _ = desk.job("python3 logger.py home")
    for host in ROUTES[route]:
        desk.grows("log", 60)
        desk.move(pid, host)
    desk.grows("log", 60)
    desk.enough()
    assert shell.status() == other.status() == 0
    lines = desk.read("log").splitlines()
    for who in ("guest", "home"):
        numbers = [int(line.split()[1]) for line in lines if line.startswith(f"{who} ")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 20
    assert len(lines) == sum(line.startswith(("guest ", "home ")) for line in lines)


@pytest.mark.parametrize("route", ROUTES)
def test_files_made_at_home_are_read_by_the_guest_and_the_other_way_round(
    desk: Desk, route: str
) -> None:
    desk.write("opened", "0123456789")
    shell, pid = desk.job("python3 reporter.py")
    assert shell.line() == "ready"
    for number, host in enumerate(ROUTES[route], 1):
        desk.move(pid, host)
        assert answer(desk, number, f"from home {number}")["asked"] == f"from home {number}"
        made = f"{desk.directory}/answer.{number}"
        owner = desk.nodes.sh("node1", 'stat -c %U:%G:%a "$1"', made)
        assert owner == "alice:alice:640"
    desk.enough()
    assert shell.status() == 0


def test_what_a_process_sees_around_it_stays(desk: Desk) -> None:
    desk.write("opened", "0123456789")
    shell, pid = desk.job("env GREETING='a b' python3 reporter.py --flag")
    assert shell.line() == "ready"
    before = answer(desk, 1, "same")
    assert before["position"] == 5
    assert before["umask"] == 0o027
    desk.move(pid, "node2")
    assert answer(desk, 2, "same") == before
    desk.enough()
    assert shell.status() == 0


def test_two_processes_move_at_once_in_both_directions(desk: Desk) -> None:
    there = Desk(desk.nodes, f"{desk.name}-there", home="node2")
    there.set_up()
    try:
        jobs = {"node1": (desk, *desk.job("python3 counter.py 7 >out"))}
        jobs["node2"] = (there, *there.job("python3 counter.py 8 >out"))
        for own, _, _ in jobs.values():
            own.grows("out")
        moves = [
            threading.Thread(target=own.migrate, args=("-p", str(pid), "-h", host))
            for (own, _, pid), host in zip(jobs.values(), ("node2", "node1"), strict=True)
        ]
        for move in moves:
            move.start()
        for move in moves:
            move.join()
        assert guests_at(desk.nodes, "node2") == {jobs["node1"][2]}
        assert guests_at(desk.nodes, "node1") == {jobs["node2"][2]}
        for own, _, _ in jobs.values():
            own.grows("out")
            own.enough()
        assert [shell.status() for _, shell, _ in jobs.values()] == [7, 8]
        for own, _, _ in jobs.values():
            assert finished(own).unbroken
    finally:
        there.remove()


def test_several_of_one_user_move_to_one_host(desk: Desk) -> None:
    jobs = [desk.job(f"python3 counter.py {n} >out{n}") for n in range(3)]
    for n in range(3):
        desk.grows(f"out{n}")
    words = [word for _, pid in jobs for word in ("-p", f"{pid:#x}")]
    desk.migrate(*words, "-H", "3", check=True)
    assert guests_at(desk.nodes, "node3") == {pid for _, pid in jobs}
    for n in range(3):
        desk.grows(f"out{n}")
    desk.enough()
    assert [shell.status() for shell, _ in jobs] == [0, 1, 2]
    assert all(desk.count(f"out{n}").unbroken for n in range(3))


def test_without_a_host_one_is_chosen_and_the_result_is_told_in_one_line(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    told = desk.migrate("-p", f"{pid:#x}", "-v", check=True)
    (where,) = [host for host in ("node2", "node3") if guests_at(desk.nodes, host) == {pid}]
    assert told.stdout.startswith(f"{pid:#x} → {where}  (frozen ")
    assert told.stdout.endswith(" MiB)\n")
    assert told.stdout.count("\n") == 1
    desk.enough()
    assert shell.status() == 7


def test_a_move_that_nobody_watches_is_silent(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    told = desk.migrate("-p", str(pid), "-h", "node2", check=True)
    assert (told.stdout, told.stderr) == ("", "")
    desk.enough()
    assert shell.status() == 7


def test_another_user_sees_nothing_of_a_guest(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    nodes = desk.nodes
    (there,) = guest_pids(nodes, "node2", pid)
    forbidden = [
        "/run/migrate/guests",
        f"/proc/{there}/cwd/",
        f"/proc/{there}/root/",
        f"/proc/{there}/fd",
        f"/proc/{there}/root{desk.directory}",
        f"/proc/{there}/cwd/out",
    ]
    for path in forbidden:
        looked = nodes.exec("node2", ["ls", path], user="bob", check=False)
        assert looked.status == 2, path
        assert "Permission denied" in looked.stderr
        nodes.exec("node2", ["ls", path])  # it is there
    assert nodes.exec("node2", ["kill", str(there)], user="bob", check=False).status == 1
    desk.enough()
    assert shell.status() == 7
