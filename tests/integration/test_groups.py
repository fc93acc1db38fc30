"""Processes grouped by writing a number, as openMosix's miggroup."""

import json

from grouping import FILES, group, guest_root, inner, run, sleepers
from holding import await_reached, held, let_go
from moving import Desk, Shell, agent_pids, guest_pids, until
from testbed.client import Nodes


def test_echo_and_cat(desk: Desk, nodes: Nodes) -> None:
    (pid,) = sleepers(desk, 1)
    assert group(nodes, "node1", pid) == "0"
    script = f'echo "$2" >{FILES}/"$1"/miggroup'
    nodes.sh("node1", script, str(pid), "12", user="alice")
    assert group(nodes, "node1", pid) == "12"
    refused = nodes.exec(
        "node1", ["bash", "-c", script, "bash", str(pid), "twelve"], user="alice", check=False
    )
    assert "Invalid argument" in refused.stderr
    assert group(nodes, "node1", pid) == "12"
    assert run(desk, "joingroup", f"{pid:#x}", "13").status == 0
    assert group(nodes, "node1", pid) == "13"


def test_somebody_elses_process_is_refused(desk: Desk, nodes: Nodes) -> None:
    (pid,) = sleepers(desk, 1)
    script = f'echo 5 >{FILES}/"$1"/miggroup'
    refused = nodes.exec("node1", ["bash", "-c", script, "bash", str(pid)], user="bob", check=False)
    assert "Operation not permitted" in refused.stderr
    joined = run(desk, "joingroup", str(pid), "5", user="bob", check=False)
    assert joined.status == 1
    assert joined.stderr == (
        f"joingroup: pid {pid}: belongs to alice; only its owner or root changes its group\n"
    )
    assert group(nodes, "node1", pid) == "0"
    nodes.sh("node1", script, str(pid))  # root may
    assert group(nodes, "node1", pid) == "5"
    reset = run(desk, "resetgroup", "5", user="bob", check=False)
    assert (reset.status, reset.stdout) == (1, "")
    assert group(nodes, "node1", pid) == "5"


def test_numbers_outlive_migd(desk: Desk, nodes: Nodes) -> None:
    first, second = sleepers(desk, 2)
    run(desk, "joingroup", str(first), "1")
    run(desk, "joingroup", str(second), "2")
    nodes.restart_migd("node1")
    assert [group(nodes, "node1", pid) for pid in (first, second)] == ["1", "2"]
    nodes.crash_migd("node1")
    assert [group(nodes, "node1", pid) for pid in (first, second)] == ["1", "2"]
    assert len(mounts(nodes)) == 1


def test_the_files_go_and_come_with_migd(desk: Desk, nodes: Nodes) -> None:
    (pid,) = sleepers(desk, 1)
    run(desk, "joingroup", str(pid), "1")
    nodes.node("node1").stop_service("migd")
    try:
        until(lambda: not mounts(nodes), "nothing is mounted")
        until(lambda: not agent_pids(nodes, "node1", "group_files"), "nobody serves the files")
    finally:
        nodes.node("node1").start_service("migd")
    until(lambda: mounts(nodes), "it is mounted again")
    assert group(nodes, "node1", pid) == "1"


def mounts(nodes: Nodes) -> list[str]:
    """What is mounted for the files on node1."""
    told = nodes.sh("node1", "cat /proc/mounts")
    return [line for line in told.splitlines() if f" {FILES} " in line]


def test_the_files_come_back_when_who_serves_them_is_killed(desk: Desk, nodes: Nodes) -> None:
    (pid,) = sleepers(desk, 1)
    run(desk, "joingroup", str(pid), "1")
    (server,) = agent_pids(nodes, "node1", "group_files")
    nodes.exec("node1", ["kill", "-KILL", str(server)])
    read = ["cat", f"{FILES}/{pid}/miggroup"]
    until(lambda: nodes.exec("node1", read, check=False).stdout == "1\n", "the file is there")
    assert len(mounts(nodes)) == 1


def test_many_write_at_once(desk: Desk, nodes: Nodes) -> None:
    pids = sleepers(desk, 2)
    script = f"""
        for writer in 1 2 3 4 5 6 7 8; do
            (for round in $(seq 50); do
                echo $writer$round >{FILES}/$1/miggroup || echo failed
                cat {FILES}/$1/miggroup
                echo $writer >{FILES}/$2/miggroup || echo failed
            done) &
        done
        wait
    """
    told = nodes.sh("node1", script, *map(str, pids), user="alice").split()
    # Every read saw one whole value that somebody wrote.
    written = {f"{writer}{count}" for writer in range(1, 9) for count in range(1, 51)}
    assert len(told) == 400
    assert set(told) <= written
    assert group(nodes, "node1", pids[0]) in {f"{writer}50" for writer in range(1, 9)}
    assert group(nodes, "node1", pids[1]) in set("12345678")


def test_a_process_that_ends_takes_its_file_along(desk: Desk, nodes: Nodes) -> None:
    shell: Shell
    shell, pid = desk.job("python3 sleeper.py")
    shell.says("ready")
    run(desk, "joingroup", str(pid), "1")
    desk.send(pid, "KILL")
    assert shell.status() == 137
    gone = nodes.exec("node1", ["cat", f"{FILES}/{pid}/miggroup"], check=False)
    assert "No such file or directory" in gone.stderr
    assert run(desk, "showgroup", "1").stdout == ""


def test_a_number_goes_wherever_its_process_goes(desk: Desk, nodes: Nodes) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    run(desk, "joingroup", str(pid), "1")
    desk.move(pid, "node2")
    assert group(nodes, "node1", pid) == "1"
    away = guest_root(nodes, "node2", pid)
    assert group(nodes, "node2", away) == "1"
    told = json.loads(run(desk, "showgroup", "--json", "1").stdout)["processes"]
    assert told == [
        {
            "pid": pid,
            "command": "python3 counter.py 7",
            "user": "alice",
            "home": "node1",
            "where": "node2",
        }
    ]
    # A restart of migd there, before anybody has looked again, loses nothing.
    nodes.crash_migd("node2")
    assert group(nodes, "node2", away) == "1"
    # What is written at one end is known at the other.
    run(desk, "joingroup", str(pid), "2")
    until(lambda: group(nodes, "node2", away) == "2", "node2 knows it")
    nodes.sh("node2", f'echo 3 >{FILES}/"$1"/miggroup', str(away), user="alice")
    until(lambda: group(nodes, "node1", pid) == "3", "home knows it")
    desk.move(pid, "node3")
    assert group(nodes, "node3", guest_root(nodes, "node3", pid)) == "3"
    desk.move(pid, "node1")
    back = guest_root(nodes, "node1", pid)
    assert [group(nodes, "node1", one) for one in (pid, back)] == ["3", "3"]
    # At home it is one process, under the pid that it always had.
    assert run(desk, "showgroup", "3").stdout.startswith(f"{pid} with commandline ")
    assert run(desk, "showgroup", "3").stdout.count("\n") == 1
    assert run(desk, "resetgroup", "3").stdout == f"resetet {pid}\n"
    assert [group(nodes, "node1", one) for one in (pid, back)] == ["0", "0"]
    desk.enough()
    assert shell.status() == 7


def test_children_keep_their_numbers_too(desk: Desk, nodes: Nodes) -> None:
    shell = desk.shell('python3 tree.py & echo "pid $!"; wait $!; echo "status $?"')
    pid = shell.pid()
    children = [int(word) for word in shell.says("children")]
    run(desk, "joingroup", str(children[0]), "4")
    run(desk, "joingroup", str(children[1]), "5")
    desk.move(pid, "node2")
    found = {
        inner(nodes, "node2", one): group(nodes, "node2", one)
        for one in guest_pids(nodes, "node2", pid)
    }
    assert found == {pid: "0", children[0]: "4", children[1]: "5"}
    desk.enough()
    assert "status 7" in shell.rest()


def test_what_is_written_during_a_move_is_not_lost(desk: Desk, nodes: Nodes) -> None:
    shell = desk.shell('python3 tree.py & echo "pid $!"; wait $!; echo "status $?"')
    pid = shell.pid()
    children = [int(word) for word in shell.says("children")]
    run(desk, "joingroup", str(pid), str(children[0]), "1")
    with held(nodes, "node1", "source-begun") as holder:
        moving = nodes.popen("node1", ["migrate", "-p", str(pid), "-h", "node2"], user="alice")
        await_reached(holder, moving)
        run(desk, "joingroup", str(pid), "2")
        run(desk, "joingroup", *map(str, children), "3")
        let_go(holder)
        assert moving.wait(60) == 0
    wanted = {pid: "2", children[0]: "3", children[1]: "3"}

    def told() -> bool:
        guests = guest_pids(nodes, "node2", pid)
        return {inner(nodes, "node2", one): group(nodes, "node2", one) for one in guests} == wanted

    until(told, "node2 knows the numbers")
    assert group(nodes, "node1", pid) == "2"


def test_what_is_written_while_the_other_end_is_cut_off_is_told_later(
    desk: Desk, nodes: Nodes
) -> None:
    (pid,) = sleepers(desk, 1)
    desk.move(pid, "node2")
    away = guest_root(nodes, "node2", pid)
    nodes.cut("node2")
    run(desk, "joingroup", str(pid), "1")
    run(desk, "joingroup", str(pid), "2")
    assert group(nodes, "node2", away) == "0"
    nodes.heal("node2")
    until(lambda: group(nodes, "node2", away) == "2", "node2 knows it", 60)
