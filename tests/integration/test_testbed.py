"""The testbed keeps its promises: to who runs commands in nodes, and to the machine it runs on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testbed import cgroup
from testbed.client import Nodes, exec_command, program_of
from testbed.errors import TestbedError
from testbed.image import SOURCES
from testbed.instance import CHECKOUT, Instance
from testbed.lifecycle import Testbed

EVERY_BYTE = bytes(range(256)) * 4096  # more than a pipe holds
ECHO = "while read -r line; do echo $line; done"


def test_exec_passes_the_exit_status_on(nodes: Nodes) -> None:
    assert nodes.exec("node1", ["sh", "-c", "exit 7"], check=False).status == 7


def test_exec_tells_a_death_by_signal_as_a_shell_does(nodes: Nodes) -> None:
    assert nodes.exec("node1", ["sh", "-c", "kill -9 $$"], check=False).status == 128 + 9


def test_exec_of_a_command_that_is_not_there_names_it(nodes: Nodes) -> None:
    result = nodes.exec("node1", ["no-such-command"], check=False)
    assert result.status == 127
    assert "no-such-command" in result.stderr


def test_exec_in_an_unknown_node_says_which_there_are(nodes: Nodes) -> None:
    result = nodes.exec("node9", ["true"], check=False)
    assert result.status == 125
    assert result.stderr == "nodes: no node is called node9; there are node1, node2, node3\n"


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_exec_carries_every_byte_both_ways(nodes: Nodes, tmp_path: Path, kind: str) -> None:
    given, got = tmp_path / "given", tmp_path / "got"
    given.write_bytes(EVERY_BYTE)
    command = exec_command(nodes.testbed, "node1", ["cat"])
    if kind == "pipe":
        done = subprocess.run(command, input=EVERY_BYTE, stdout=subprocess.PIPE, check=True)
        assert done.stdout == EVERY_BYTE
    else:
        with given.open("rb") as stdin, got.open("wb") as stdout:
            subprocess.run(command, stdin=stdin, stdout=stdout, check=True)
        assert got.read_bytes() == EVERY_BYTE


def test_exec_gives_the_command_nothing_that_was_opened_outside(
    nodes: Nodes, tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    with Path("/etc/passwd").open() as stdin, shown.open("w") as stdout:
        command = exec_command(nodes.testbed, "node1", ["ls", "-l", "/proc/self/fd"], user="alice")
        subprocess.run(command, stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, check=True)
    targets = dict(line.split()[-3::2] for line in shown.read_text().splitlines()[1:])
    assert targets["0"].startswith("pipe:")
    assert targets["1"].startswith("pipe:")
    assert targets["2"] == "/dev/null"
    assert targets["3"].startswith("/proc/")  # the directory that ls reads
    assert len(targets) == 4
    inside = nodes.sh("node1", "stat -Lc %m /dev/null")
    assert inside == "/dev"  # the node's own


def test_exec_runs_a_user_as_a_login_would(nodes: Nodes) -> None:
    script = 'id -un; id -Gn; pwd; echo "$HOME $USER $LOGNAME $SHELL $PATH"; umask'
    assert nodes.sh("node1", script, user="alice").splitlines() == [
        "alice",
        "alice",
        "/home/alice",
        "/home/alice alice alice /bin/bash /usr/local/bin:/usr/bin:/bin",
        "0022",
    ]


def test_exec_makes_a_session_and_a_place_among_the_cgroups(nodes: Nodes) -> None:
    script = "echo $$; ps -o sid=,pgid= -p $$; grep ^0:: /proc/self/cgroup"
    pid, ids, group = nodes.sh("node1", script, user="bob").splitlines()
    assert ids.split() == [pid, pid]
    assert group == "0::/user-bob"


def test_exec_with_a_terminal_has_one_of_the_nodes(nodes: Nodes) -> None:
    shell = nodes.popen(
        "node1",
        ["sh", "-c", 'tty; ls -l "$(tty)" | cut -c1-16; stty size; read -r line; echo "<$line>"'],
        user="alice",
        tty=True,
        stdin=subprocess.PIPE,
    )
    output, _ = shell.communicate(b"typed\n", timeout=20)
    lines = output.decode().split("\r\n")
    assert any(line.startswith("/dev/pts/") for line in lines)
    assert any(line.startswith("crw--w----") for line in lines)
    assert "24 80" in lines
    assert "typed" in lines[:-2]  # echoed
    assert lines[-2] == "<typed>"
    assert shell.returncode == 0


def test_ctrl_c_ends_the_command(nodes: Nodes) -> None:
    command = nodes.popen("node1", ["sh", "-c", "echo started; sleep 600"])
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"started\n"
        command.send_signal(signal.SIGINT)
        assert command.wait(10) == 128 + signal.SIGINT
    assert "sleep 600" not in nodes.sh("node1", "ps -eo args")


def test_a_reader_that_leaves_ends_the_writer_as_in_a_shell(nodes: Nodes) -> None:
    command = nodes.popen("node1", ["yes"])
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"y\n"
        command.stdout.close()
        assert command.wait(10) == 128 + signal.SIGPIPE


def test_nodes_know_each_other_by_name(nodes: Nodes) -> None:
    for there in ("node2", "node3"):
        assert nodes.exec("node1", ["ssh", there, "hostname"]).stdout == f"{there}\n"


def test_a_node_switched_off_and_on_has_its_disk_and_another_boot_id(nodes: Nodes) -> None:
    boot_id = "cat /proc/sys/kernel/random/boot_id"
    before, other = nodes.sh("node2", boot_id), nodes.sh("node1", boot_id)
    nodes.sh("node2", "echo kept >/home/alice/file; echo lost >/run/file")
    running = nodes.popen("node2", ["sh", "-c", "echo started; sleep 600"])
    with running:
        assert running.stdout is not None
        running.stdout.readline()
        nodes.kill("node2")
        assert running.wait(10) == 128 + signal.SIGKILL
    with pytest.raises(TestbedError, match="node2 is off"):
        nodes.node("node2").pid_or_error()
    nodes.boot("node2")
    after = nodes.sh("node2", boot_id)
    assert len({before, other, after}) == 3
    assert nodes.sh("node2", "cat /home/alice/file; ls /run/file", check=False) == "kept"
    nodes.sh("node2", "rm /home/alice/file")


def test_a_connection_waits_while_the_network_is_cut_and_goes_on_when_it_heals(
    nodes: Nodes,
) -> None:
    talk = nodes.popen("node1", ["ssh", "node3", ECHO], stdin=subprocess.PIPE)
    with talk:
        assert talk.stdin is not None and talk.stdout is not None
        talk.stdin.write(b"one\n")
        talk.stdin.flush()
        assert talk.stdout.readline() == b"one\n"
        nodes.cut("node3")
        assert nodes.exec("node1", ["ping", "-c1", "-W1", "node3"], check=False).status == 1
        talk.stdin.write(b"two\n")
        talk.stdin.flush()
        os.set_blocking(talk.stdout.fileno(), False)
        assert nodes.exec("node2", ["ping", "-c1", "-W1", "node1"]).status == 0
        assert talk.stdout.read() is None
        os.set_blocking(talk.stdout.fileno(), True)
        nodes.heal("node3")
        assert talk.stdout.readline() == b"two\n"
        talk.stdin.close()
        assert talk.wait(20) == 0


def test_a_peer_of_a_node_that_lost_its_power_hears_nothing(nodes: Nodes) -> None:
    talk = nodes.popen("node1", ["ssh", "node3", "echo started; cat"], stdin=subprocess.PIPE)
    with talk:
        assert talk.stdout is not None
        assert talk.stdout.readline() == b"started\n"
        nodes.kill("node3")
        assert "ESTAB" in nodes.sh("node1", "ss -tn dst 10.88.0.3")
        talk.terminate()


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_a_service_comes_back_and_what_it_started_lives_on(nodes: Nodes, how: str) -> None:
    session = nodes.popen("node1", ["ssh", "node2", "echo started; cat"], stdin=subprocess.PIPE)
    with session:
        assert session.stdout is not None and session.stdin is not None
        session.stdout.readline()
        old = next(line for line in nodes.node("node2").service_states() if "ssh" in line)
        if how == "restarted":
            nodes.node("node2").restart_service("ssh")
        else:
            nodes.node("node2").crash_service("ssh")
        new = next(line for line in nodes.node("node2").service_states() if "ssh" in line)
        assert old.split()[1] == new.split()[1] == "ready"
        assert old.split()[2] != new.split()[2]
        output, _ = session.communicate(b"still here\n", timeout=20)
        assert output == b"still here\n"


# What it leaves behind: with a checkout, and so a testbed, of its own.


@pytest.fixture
def other_testbed(tmp_path: Path) -> Testbed:
    """A copy of this checkout: its testbed is another one, and down."""
    for name in (*SOURCES, "tests/testbed"):
        source, target = CHECKOUT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return Testbed(Instance(tmp_path))


def run_word(testbed: Testbed, *words: str) -> str:
    command = [sys.executable, "-IS", str(program_of(testbed)), *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def machine_state() -> tuple[str, str]:
    """The machine's network links and mounts."""
    links = subprocess.run(["ip", "-o", "link"], check=True, stdout=subprocess.PIPE, text=True)
    return links.stdout, Path("/proc/self/mounts").read_text()


def assert_nothing_is_left(testbed: Testbed) -> None:
    assert not (cgroup.mount_point() / testbed.instance.cgroup_name).exists()
    assert not testbed.instance.run.exists()
    assert not testbed.instance.disks.exists()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (process / "mountinfo").read_text()
        except OSError:  # it has just ended
            continue
        assert str(testbed.instance.disks) not in mounts


def test_after_down_nothing_is_left_and_other_testbeds_go_on(
    nodes: Nodes, other_testbed: Testbed
) -> None:
    before = machine_state()
    try:
        run_word(other_testbed, "up", "--count", "2")
        others = Nodes(other_testbed)
        assert others.names == ["node1", "node2"]
        assert others.sh("node1", "hostname") == "node1"
        with others.popen("node2", ["sh", "-c", "echo started; sleep 600"]) as running:
            assert running.stdout is not None
            running.stdout.readline()
            run_word(other_testbed, "down")
            assert running.wait(10) == 128 + signal.SIGKILL
    finally:
        run_word(other_testbed, "down")
    assert_nothing_is_left(other_testbed)
    assert machine_state() == before
    assert nodes.sh("node1", "hostname") == "node1"


def test_down_cleans_up_after_an_up_that_was_killed(other_testbed: Testbed) -> None:
    before = machine_state()
    starting = subprocess.Popen(
        [sys.executable, "-IS", str(program_of(other_testbed)), "up", "--count", "2"],
        stdout=subprocess.DEVNULL,
    )
    first_node = cgroup.mount_point() / other_testbed.instance.cgroup_name / "node1/init.scope"
    deadline = time.monotonic() + 60
    while not first_node.exists() and starting.poll() is None:
        assert time.monotonic() < deadline
    starting.kill()
    starting.wait()
    try:
        assert first_node.exists()
    finally:
        run_word(other_testbed, "down")
    assert_nothing_is_left(other_testbed)
    assert machine_state() == before


def test_up_undoes_what_it_began_when_it_is_interrupted(other_testbed: Testbed) -> None:
    starting = subprocess.Popen(
        [sys.executable, "-IS", str(program_of(other_testbed)), "up", "--count", "2"],
        stdout=subprocess.DEVNULL,
    )
    switch = cgroup.mount_point() / other_testbed.instance.cgroup_name / "switch"
    while not switch.exists() and starting.poll() is None:
        pass
    starting.send_signal(signal.SIGINT)
    assert starting.wait(30) == 130
    assert_nothing_is_left(other_testbed)
