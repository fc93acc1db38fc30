"""A guest's files wherever it goes: what comes from home, what from the host, what is kept from it."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from moving import Desk, guest_pids

HOME_ONLY = ("/data", "/srv/a/deep", "/mnt/a b", "/opt/x", "/var/lib/own/deep", "/usr/share/own")
REMOVE = "rm -rf /data /srv/a '/mnt/a b' /opt/x /var/lib/own /usr/share/own"
LOCAL_PROGRAM = "/usr/local/bin/own-python"
PACKAGED_PROGRAM = "/usr/bin/own-python"
PACKAGE = "Package: own\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n"
SETUID = """\
'''Answers the file `ask` with what became of setuid programs; `enough` ends it.'''
import os, subprocess, time

while not os.path.exists("enough"):
    if os.path.exists("ask"):
        os.unlink("ask")
        for program in ("/opt/x/id", "./id", "/usr/local/bin/own-id"):
            told = subprocess.run([program, "-u"], capture_output=True, text=True)
            print(program, told.stdout.strip() or told.stderr, flush=True)
        print("done", flush=True)
    time.sleep(0.01)
"""


@dataclass
class Elsewhere(Desk):
    """A desk outside of /home."""

    place: str = ""

    @property
    def directory(self) -> str:
        return f"{self.place}/{self.name}"


@pytest.fixture
def places(desk: Desk) -> Iterator[None]:
    """Directories of alice's that exist on node1 only."""
    desk.nodes.sh("node1", 'mkdir -p "$@" && chown alice "$@"', *HOME_ONLY)
    yield
    desk.nodes.sh("node1", REMOVE)


@pytest.mark.parametrize("place", HOME_ONLY)
def test_a_working_directory_and_an_open_file_that_only_home_has(
    desk: Desk, places: None, place: str
) -> None:
    there = Elsewhere(desk.nodes, desk.name, place=place)
    there.set_up()
    shell, pid = there.job("python3 logger.py guest")
    desk.shells += there.shells
    for host in ("node2", "node3", "node1", "node2"):
        there.grows("log")
        there.move(pid, host)
    there.grows("log")
    there.enough()
    assert shell.status() == 0
    numbers = [int(line.split()[1]) for line in there.read("log").splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.fixture
def local_program(desk: Desk) -> Iterator[str]:
    """A program that node1 alone has, beside its packages."""
    desk.nodes.sh("node1", 'cp /usr/bin/python3 "$1"', LOCAL_PROGRAM)
    yield LOCAL_PROGRAM
    desk.nodes.sh("node1", 'rm "$1"', LOCAL_PROGRAM)


@pytest.fixture
def packaged_program(desk: Desk) -> Iterator[str]:
    """A program of a package that node1 alone has."""
    nodes = desk.nodes
    nodes.sh("node1", 'cp /usr/bin/python3 "$1"; cd /var/lib/dpkg; cp status own', PACKAGED_PROGRAM)
    nodes.sh("node1", 'printf "\\n%s" "$1" >>/var/lib/dpkg/status', PACKAGE)
    yield PACKAGED_PROGRAM
    nodes.sh("node1", 'rm "$1"; cd /var/lib/dpkg; mv own status', PACKAGED_PROGRAM)


@pytest.mark.parametrize("program", ["local_program", "packaged_program"])
def test_a_program_that_only_home_has(
    desk: Desk, program: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(program)
    shell, pid = desk.job(f"{path} counter.py 7 >out")
    for host in ("node2", "node3", "node1", "node2"):
        desk.grows("out")
        desk.move(pid, host)
    desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    assert desk.count().unbroken


def test_hosts_with_the_same_programs_use_their_own(desk: Desk) -> None:
    shell, pid = desk.job("python3 counter.py 7 >out")
    desk.grows("out")
    desk.move(pid, "node2")
    (there,) = guest_pids(desk.nodes, "node2", pid)
    mounts = desk.nodes.sh("node2", "cat /proc/$1/mounts", str(there)).splitlines()
    from_home = {line.split()[1] for line in mounts if line.startswith("home ")}
    assert "/home" in from_home
    assert not {"/usr", "/usr/local", "/opt", "/etc"} & from_home
    desk.enough()
    assert shell.status() == 7


def test_no_program_gains_rights_in_a_capsule(desk: Desk, places: None) -> None:
    nodes = desk.nodes
    nodes.sh("node1", 'cp /usr/bin/id /opt/x; cp /usr/bin/id "$1"', desk.directory)
    nodes.sh("node1", 'chmod 4755 /opt/x/id "$1/id"', desk.directory)
    for node in nodes.names:
        nodes.sh(node, "cp -p /usr/bin/id /usr/local/bin/own-id; chmod 4755 /usr/local/bin/own-id")
    try:
        desk.write("setuid.py", SETUID)
        shell, pid = desk.job("python3 setuid.py")
        desk.write("ask")
        said = [shell.line() for _ in range(4)]
        assert said == ["/opt/x/id 0", "./id 0", "/usr/local/bin/own-id 0", "done"]
        uid = nodes.sh("node1", "id -u alice").strip()
        desk.move(pid, "node2")
        desk.write("ask")
        said = [shell.line() for _ in range(4)]
        assert said == [f"/opt/x/id {uid}", f"./id {uid}", f"/usr/local/bin/own-id {uid}", "done"]
        desk.enough()
        assert shell.status() == 0
    finally:
        for node in nodes.names:
            nodes.sh(node, "rm -f /usr/local/bin/own-id")


def test_a_guest_reaches_neither_migd_nor_the_kept_criu(desk: Desk) -> None:
    desk.write(
        "look.sh",
        "while [ ! -e enough ]; do [ -e ask ] && { rm ask; echo $(ls /run/migrate); "
        'ls /run/migrate/criu >/dev/null 2>&1; echo "$?"; }; sleep 0.01; done',
    )
    shell, pid = desk.job("sh look.sh")
    desk.move(pid, "node2")
    desk.write("ask")
    assert shell.line() == "criu"
    assert shell.line() == "2"
    desk.enough()
    assert shell.status() == 0


READER = """\
'''Reads the file `log` as it grows, and prints the numbers in it, until one is "enough".'''
import time

log = open("log")
while True:
    line = log.readline()
    if not line.endswith("\\n"):
        log.seek(log.tell() - len(line))
        time.sleep(0.002)
        continue
    print(line.split()[1], flush=True)
    if line.split()[1] == "enough":
        break
"""


def test_a_log_that_grows_at_home_while_its_reader_moves(desk: Desk) -> None:
    desk.write("reader.py", READER)
    _, _ = desk.job("python3 logger.py home")
    desk.grows("log")
    shell, pid = desk.job("python3 reader.py >out")
    for host in ("node2", "node3", "node1", "node3", "node1") * 2:
        desk.grows("out")
        desk.move(pid, host)
    desk.grows("out")
    desk.enough()
    desk.nodes.sh("node1", 'sleep 0.1; echo home enough >>"$1/log"', desk.directory)
    assert shell.status() == 0
    numbers = desk.read("out").splitlines()
    assert numbers == [*map(str, range(1, len(numbers))), "enough"]


@pytest.mark.parametrize("use", ["open", "mapped"])
def test_named_shared_memory_is_refused_by_name(desk: Desk, use: str) -> None:
    name = f"/dev/shm/own-{desk.name}"
    desk.write(
        "memory.py",
        "import mmap, os, sys, time\n"
        "file = open(sys.argv[1], 'w+b')\n"
        "file.truncate(4096)\n"
        "if sys.argv[2] == 'mapped':\n"
        "    memory = mmap.mmap(file.fileno(), 4096)\n"
        "    file.close()\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists('enough'): time.sleep(0.01)\n"
        "os.unlink(sys.argv[1])\n",
    )
    shell, pid = desk.job(f"python3 memory.py {name} {use}")
    assert shell.line() == "ready"
    told = desk.migrate("-p", str(pid), "-h", "node2")
    assert told.status == 125
    assert name in told.stderr and "named shared memory" in told.stderr
    desk.enough()
    assert shell.status() == 0
