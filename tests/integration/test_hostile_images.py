"""A hostile host sends images, or serves a view, that would give its guest a file which its owner cannot read.

The guest has a file of alice's open at home; the destination's /etc/shadow has the same mode and size,
so that nothing but the check of images stands between them.
"""

from __future__ import annotations

from collections.abc import Callable

from holding import await_reached, held, let_go
from moving import Desk, guests_at
from testbed.client import Result

SECRET = "/etc/shadow"
SAME_LENGTH = "/tmp/shadow"
SETTLED_SECONDS = 60


def like_the_secret(desk: Desk, path: str) -> None:
    """Make a file of alice's at home that CRIU, at node2, could not tell from its secret."""
    mode, size = desk.nodes.sh("node2", f"stat -c '%a %s' {SECRET}").split()
    script = 'truncate -s "$2" "$1" && chmod "$3" "$1"'
    desk.nodes.sh("node1", script, path, size, mode, user="alice")


def move_meddled(
    desk: Desk, pid: int, point: tuple[str, str], meddle: Callable[[], None]
) -> Result:
    """Move it to node2, with the meddling done while the move waits at a point on a node."""
    nodes = desk.nodes
    with held(nodes, *point) as holder:
        client = nodes.popen("node1", ["migrate", "-p", str(pid), "-h", "node2"], user="alice")
        try:
            await_reached(holder, client)
            try:
                meddle()
            finally:
                let_go(holder)
            stdout, stderr = client.communicate(timeout=SETTLED_SECONDS)
        finally:
            client.kill()
            client.wait()
    return Result(client.returncode, stdout.decode(), stderr.decode())


def test_a_source_that_names_anothers_file_is_refused(desk: Desk) -> None:
    like_the_secret(desk, SAME_LENGTH)
    _, pid = desk.job(f"python3 counter.py 3 >out 3<{SAME_LENGTH}")
    desk.grows("out")

    def meddle() -> None:
        images = "/run/migrate/guests/guard-*/dump/files.img"
        assert desk.nodes.sh("node1", f"grep -c {SAME_LENGTH} {images}") == "1"
        desk.nodes.sh("node1", f"sed -i s:{SAME_LENGTH}:{SECRET}: {images}")

    try:
        told = move_meddled(desk, pid, ("node1", "source-dumped"), meddle)
        assert told.status == 125
        assert f"their owner may not read {SECRET} here" in told.stderr
        assert guests_at(desk.nodes, "node2") == set()
        desk.grows("out")
        assert desk.count().unbroken
        desk.move(pid, "node2")  # the honest images go
        desk.enough()
        assert desk.shells[-1].status() == 3
    finally:
        desk.nodes.sh("node1", f"rm -f {SAME_LENGTH}")


def test_a_home_that_lays_a_link_before_criu_comes_is_refused(desk: Desk) -> None:
    path = f"{desk.directory}/plain"
    like_the_secret(desk, path)
    _, pid = desk.job("python3 counter.py 3 >out 3<plain")
    desk.grows("out")
    told = move_meddled(
        desk,
        pid,
        ("node2", "destination-received"),
        lambda: desk.nodes.sh("node1", 'ln -sf "$2" "$1"', path, SECRET, user="alice") or None,
    )
    assert told.status == 125
    assert f"{path} cannot be opened" in told.stderr
    assert guests_at(desk.nodes, "node2") == set()
    desk.grows("out")
    desk.enough()
    assert desk.shells[-1].status() == 3
    assert desk.count().unbroken


READ_LINKS = """\
import os, time
while not os.path.exists("go"):
    time.sleep(0.01)
print(open("link").read(), os.path.samefile("/bin/sh", "/usr/bin/sh"), flush=True)
"""


def test_a_guest_follows_links(desk: Desk) -> None:
    """At home's, and at this host's."""
    desk.nodes.sh("node1", 'ln -s beside "$1/link"', desk.directory, user="alice")
    desk.write("beside", "seen")
    desk.write("links.py", READ_LINKS)
    shell, pid = desk.job("python3 links.py >out")
    desk.move(pid, "node2")
    desk.write("go")
    assert shell.status() == 0
    assert desk.read("out") == "seen True\n"
