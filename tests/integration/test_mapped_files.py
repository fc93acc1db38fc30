"""A guest's writes into a mapped file of home's: there, and at the next host, before the guest goes on."""

from holding import await_reached, held, let_go
from moving import PATIENCE_SECONDS, Desk, until

MAPPER = """\
'''Writes where it runs into a mapped file, a page for each place, when the file go.N comes; then tells.'''
import mmap, os, time

with open("mapped", "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
for number in range(3):
    while not os.path.exists(f"go.{number}"):
        time.sleep(0.005)
    memory[number * 4096 : number * 4096 + 4] = b"was%d" % number
    seen = [memory[at * 4096 : at * 4096 + 4].decode() for at in range(3)]
    with open(f"seen.{number}", "w") as told:
        print(*seen, file=told)
"""


def pages(desk: Desk) -> list[str]:
    """The beginning of each page of the file at home."""
    data = desk.path("mapped").read_bytes()
    return [data[at : at + 4].decode() for at in range(0, len(data), 4096)]


def test_what_a_guest_writes_into_a_mapped_file_goes_home_before_the_guest_goes_on(
    desk: Desk,
) -> None:
    desk.write("mapped", "-" * 3 * 4096)
    desk.write("mapper.py", MAPPER)
    shell, pid = desk.job("python3 mapper.py")
    desk.move(pid, "node2")
    desk.write("go.0")
    until(lambda: desk.read("seen.0") == "was0 ---- ----\n", "it has written at node2")
    with held(desk.nodes, "node2", "source-ready") as holder:
        words = ["migrate", "-p", str(pid), "-h", "node3"]
        client = desk.nodes.popen("node1", words, user="alice")
        await_reached(holder, client)
        assert pages(desk) == ["was0", "----", "----"]
        let_go(holder)
        assert client.wait(PATIENCE_SECONDS) == 0
    desk.write("go.1")
    until(lambda: desk.read("seen.1") == "was0 was1 ----\n", "it has written at node3")
    desk.move(pid, "node1")
    desk.write("go.2")
    assert shell.status() == 0
    assert desk.read("seen.2") == "was0 was1 was2\n"
    assert pages(desk) == ["was0", "was1", "was2"]
