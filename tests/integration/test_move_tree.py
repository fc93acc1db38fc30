"""A whole tree moves: processes, threads, the memory they share, the pipes among them."""

import pytest
from moving import Desk, guest_pids, guests_at, until

ROUTES = {
    "one hop": ["node2"],
    "two hops": ["node2", "node3"],
    "there and home": ["node2", "node1"],
}
MULTIPROCESSING = """\
'''A pool of workers; each result depends on memory that all share and on a lock of theirs.'''
import multiprocessing, os, sys

context = multiprocessing.get_context("fork")
total = context.Value("q", 0)

def work(number):
    with total:
        total.value += number
    return number * number

with context.Pool(2) as pool:
    done = 0
    while not os.path.exists("enough"):
        squares = pool.map(work, range(50))
        assert squares == [n * n for n in range(50)], squares
        done += 1
        assert total.value == done * sum(range(50)), total.value
        print("batch", done, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("route", ROUTES)
def test_threads_shared_memory_and_pipes_go_on_working(desk: Desk, route: str) -> None:
    shell, pid = desk.job("python3 tree.py >out")
    desk.grows("out")
    for host in ROUTES[route]:
        desk.move(pid, host)
        assert len(guest_pids(desk.nodes, host, pid)) == 3
        desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    lines = desk.read("out").splitlines()
    rounds = [int(line.split()[1]) for line in lines if line.startswith("round ")]
    assert rounds == list(range(2, 2 * len(rounds) + 2, 2))
    assert lines[-1] == "alive 6"


def test_at_home_only_the_root_of_the_tree_has_a_deputy(desk: Desk) -> None:
    shell, pid = desk.job("python3 tree.py >out")
    desk.grows("out")
    children = [int(word) for word in desk.read("out").splitlines()[0].split()[1:]]
    assert all(desk.state(child) for child in children)
    desk.move(pid, "node2")
    assert desk.state(pid)
    until(lambda: not any(desk.state(child) for child in children), "the others have gone")
    desk.enough()
    assert shell.status() == 7


def test_a_killed_tree_is_dead_as_a_whole(desk: Desk) -> None:
    """As at home its other members would be orphans, but they notice that the pipe has ended."""
    shell, pid = desk.job("python3 tree.py >out")
    desk.grows("out")
    desk.move(pid, "node2")
    desk.send(pid, "KILL")
    assert shell.status() == 128 + 9
    until(lambda: not guests_at(desk.nodes, "node2"), "nothing of it is left")


@pytest.mark.parametrize("route", ROUTES)
def test_a_pool_of_workers_with_semaphores_goes_on(desk: Desk, route: str) -> None:
    desk.write("pool.py", MULTIPROCESSING)
    shell, pid = desk.job("python3 pool.py >out")
    desk.grows("out")
    for host in ROUTES[route]:
        desk.move(pid, host)
        desk.grows("out")
    desk.enough()
    assert shell.status() == 7
    numbers = [int(line.split()[1]) for line in desk.read("out").splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_shell_script_moves_with_what_it_runs(desk: Desk) -> None:
    desk.write(
        "script.sh",
        "n=0; while [ ! -e enough ]; do n=$((n+1)); echo $n | cat; sleep 0.01; done; exit 7",
    )
    shell, pid = desk.job("sh script.sh >out")
    for host in ("node2", "node3", "node1"):
        desk.grows("out", 10)
        desk.move(pid, host)
    desk.grows("out", 10)
    desk.enough()
    assert shell.status() == 7
    numbers = [int(line) for line in desk.read("out").splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_large_process_moves_with_its_memory(desk: Desk) -> None:
    desk.write(
        "large.py",
        "import hashlib, os, time\n"
        "block = os.urandom(64 << 20)\n"
        "print(hashlib.md5(block).hexdigest(), flush=True)\n"
        "while not os.path.exists('enough'): time.sleep(0.01)\n"
        "print(hashlib.md5(block).hexdigest(), flush=True)\n",
    )
    shell, pid = desk.job("python3 large.py")
    before = shell.line()
    for host in ("node2", "node3"):
        desk.move(pid, host)
    desk.enough()
    assert shell.line() == before
    assert shell.status() == 0
