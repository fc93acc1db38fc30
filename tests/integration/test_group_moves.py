"""Groups of processes that move: openMosix's migrategroup, and what migrate and migctl do with groups."""

import json

from grouping import group, guest_root, run, sleepers
from holding import await_reached, held, let_go
from moving import Desk, Shell, guests_at, until
from testbed.client import Nodes


def shells(desk: Desk, count: int) -> dict[int, Shell]:
    """Jobs of alice's, each a shell that reads its script and ends with 7 when `enough` is here."""
    desk.write("script", "while [ ! -e enough ]; do sleep 0.1; done; exit 7\n")
    jobs = [desk.job("bash <script") for _ in range(count)]
    return {pid: shell for shell, pid in jobs}


def test_the_manuals_example(desk: Desk, nodes: Nodes) -> None:
    jobs = shells(desk, 6)
    pids = list(jobs)
    words = [str(pid) for pid in pids]
    assert run(desk, "joingroup", *words, "1").stdout.splitlines() == [
        "miggroup = 1",
        f"processes = {' '.join(words)}",
        *(f"process {pid} joins the miggroup 1 now" for pid in pids),
    ]
    shown = [f"{pid} with commandline bash belongs to 1" for pid in pids]
    assert run(desk, "showgroup", "1").stdout.splitlines() == shown
    moved = run(desk, "migrategroup", "1", "2")
    assert moved.stdout.splitlines() == [f"migrate {pid} to 2" for pid in pids]
    assert moved.stderr == ""
    assert guests_at(nodes, "node2") == set(pids)
    assert run(desk, "showgroup", "1").stdout.splitlines() == shown
    assert {group(nodes, "node2", guest_root(nodes, "node2", pid)) for pid in pids} == {"1"}
    again = run(desk, "migrategroup", "1", "node2")
    assert again.stdout.splitlines() == [f"{pid} is on node2 already" for pid in pids]
    assert run(desk, "resetgroup", "1").stdout.splitlines() == [f"resetet {pid}" for pid in pids]
    assert run(desk, "showgroup", "1").stdout == ""
    desk.enough()
    assert [shell.status() for shell in jobs.values()] == [7] * 6


def test_members_that_die_meanwhile_do_not_keep_the_others(desk: Desk, nodes: Nodes) -> None:
    pids = sleepers(desk, 6)
    run(desk, "joingroup", *map(str, pids), "1")
    with held(nodes, "node1", "source-begun") as holder:
        moving = nodes.popen("node1", ["migrategroup", "1", "node2"], user="alice")
        await_reached(holder, moving)
        # Of the first four one at least waits there; the last is not looked at before they are through.
        desk.send(pids[0], "KILL")
        desk.send(pids[5], "KILL")
        let_go(holder)
        stdout, stderr = moving.communicate(timeout=60)
    assert moving.returncode == 1
    assert stdout.decode().splitlines() == [f"migrate {pid} to node2" for pid in pids[1:5]]
    told = stderr.decode().splitlines()
    assert len(told) == 2, told
    assert told[0].startswith(f"migrategroup: {pids[0]} not migrated to node2: ")
    assert told[1].startswith(f"migrategroup: {pids[5]} not migrated to node2: ")
    assert guests_at(nodes, "node2") == set(pids[1:5])


def test_members_that_cannot_be_separated_are_named_first(desk: Desk, nodes: Nodes) -> None:
    shell, parent = desk.job("python3 pair.py")
    pair = [int(word) for word in shell.says("children")]
    (free,) = sleepers(desk, 1)
    run(desk, "joingroup", *map(str, pair), str(free), "1")
    parted = run(desk, "migrategroup", "1", "node2", check=False)
    assert parted.status == 1
    assert parted.stdout == f"migrate {free} to node2\n"
    told = parted.stderr.splitlines()
    assert len(told) == 2, told
    for one, other, line in zip(pair, reversed(pair), told, strict=True):
        assert line.startswith(f"migrategroup: {one} not migrated to node2: ")
        assert f"is connected to pid {other} (python3), outside of the tree" in line
        assert f"let their common parent, pid {parent} (python3), join" in line
    # With their parent they are one tree.
    run(desk, "joingroup", str(parent), "1")
    together = run(desk, "migrategroup", "1", "node2")
    assert set(together.stdout.splitlines()) == {
        f"{free} is on node2 already",
        *(f"migrate {pid} to node2" for pid in (parent, *pair)),
    }
    assert guests_at(nodes, "node2") == {free, parent}
    desk.enough()
    assert shell.status() == 7


def test_nobody_moves_somebody_elses_members(desk: Desk, nodes: Nodes) -> None:
    pids = sleepers(desk, 2)
    run(desk, "joingroup", *map(str, pids), "1")
    desk.move(pids[0], "node2")
    refused = run(desk, "migrategroup", "1", "node3", user="bob", check=False)
    assert (refused.status, refused.stdout) == (1, "")
    assert refused.stderr.count("not migrated to node3: ") == 2
    assert guests_at(nodes, "node2") == {pids[0]}


def test_a_group_goes_to_idle_hosts_and_comes_home(desk: Desk, nodes: Nodes) -> None:
    pids = sleepers(desk, 2)
    run(desk, "joingroup", *map(str, pids), "1")
    desk.migrate("-p", "@1", check=True)
    # Spread: no host has both.
    assert [len(guests_at(nodes, node)) for node in ("node2", "node3")] == [1, 1]
    where = {
        row["pid"]: row["where"]
        for row in json.loads(run(desk, "showgroup", "--json", "1").stdout)["processes"]
    }
    listed = run(desk, "migctl", "group", "list").stdout.splitlines()
    assert listed == [f"1\t{pid:#x}\talice\tnode1\t{where[pid]}\tsleep 600" for pid in pids]
    home = run(desk, "migctl", "group", "evict", "1")
    assert home.stdout.splitlines() == [f"{pid:#x} → node1" for pid in pids]
    assert guests_at(nodes, "node1") == set(pids)


def test_a_host_sends_the_guests_of_a_group_home(desk: Desk, nodes: Nodes) -> None:
    pids = sleepers(desk, 2)
    run(desk, "joingroup", str(pids[0]), "1")
    for pid in pids:
        desk.migrate("-p", str(pid), "-h", "node2", check=True)
    away = guest_root(nodes, "node2", pids[0])
    # Neither is it somebody else's business, nor does it concern who is in no group.
    refused = run(desk, "migctl", "group", "evict", "1", node="node2", user="bob", check=False)
    assert f"pid {away}: belongs to alice" in refused.stderr
    told = run(desk, "migctl", "group", "evict", "1", node="node2")
    assert told.stdout == f"{away:#x} is sent home\n"
    until(lambda: guests_at(nodes, "node1") == {pids[0]}, "it is home", 60)
    until(lambda: guests_at(nodes, "node2") == {pids[1]}, "only the other is left there", 60)


def test_a_guest_is_moved_on_where_it_runs(desk: Desk, nodes: Nodes) -> None:
    (pid,) = sleepers(desk, 1)
    run(desk, "joingroup", str(pid), "1")
    desk.move(pid, "node2")
    away = guest_root(nodes, "node2", pid)
    moved = run(desk, "migrategroup", "1", "3", node="node2")
    assert moved.stdout == f"migrate {away} to 3\n"
    assert guests_at(nodes, "node3") == {pid}
    assert f"\t{pid:#x}\talice\tnode1\tnode3\t" in run(desk, "migctl", "group", "list").stdout


def test_wrong_words_change_nothing(desk: Desk) -> None:
    def says(*words: str) -> str:
        done = run(desk, *words, check=False)
        assert (done.status, done.stdout) == (125, "")
        return done.stderr

    (pid,) = sleepers(desk, 1)
    assert says("joingroup", str(pid)) == (
        "joingroup: usage: joingroup PID... GROUP; see `joingroup --help`\n"
    )
    assert "groups are 0 to 2147483647" in says("joingroup", str(pid), "2147483648")
    assert "groups are 1 to 2147483647" in says("showgroup", "0")
    assert "has no members" in says("migrategroup", "77", "node2")
    run(desk, "joingroup", str(pid), "1")
    assert "nowhere" in says("migrategroup", "1", "nowhere")
    assert "host ids are 1 to 65535" in says("migrategroup", "1", "0")


def test_members_that_talk_through_a_pipe_move_each_for_itself(desk: Desk, nodes: Nodes) -> None:
    shell = desk.shell(
        "python3 counter.py 0 | python3 copier.py >out &\n"
        'echo "pids $(jobs -p) $!"; wait $!; echo "status $?"'
    )
    pids = [int(word) for word in shell.says("pids")]
    desk.grows("out")
    run(desk, "joingroup", *map(str, pids), "1")
    checked = run(desk, "migrate", "--check", "-p", "@1")
    assert checked.stdout.splitlines() == [f"{pid:#x} can move" for pid in sorted(pids)]
    assert run(desk, "migrategroup", "1", "node2").stdout.splitlines() == [
        f"migrate {pid} to node2" for pid in sorted(pids)
    ]
    assert guests_at(nodes, "node2") == set(pids)
    desk.grows("out")
    desk.enough()
    assert shell.status() == 0
    assert desk.count().unbroken
