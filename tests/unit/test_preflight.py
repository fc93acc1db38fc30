"""Preflight names every reason why a process can not move, and nothing to those who may not ask."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helper_processes import HELPER_UID, STRANGER_UID, Helper, helper, without

from criu_hooks.fds import FileKind
from criu_hooks.maps import Memory, parse_maps
from criu_hooks.namespaces import Namespaces
from criu_hooks.obstacles import Obstacle, printable
from criu_hooks.preflight import check, examine, notes
from criu_hooks.preflight_files import GHOST_LIMIT_BYTES, default_view
from criu_hooks.proc import Capabilities, Credentials, Ids
from criu_hooks.surroundings import Surroundings
from criu_hooks.tree import Process, ProcessTree
from migrate.errors import UserError

HERE = Namespaces.of(os.getpid())

PRIVATE_MEMORY_FILTER = """
class Insn(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("t", ctypes.c_ubyte), ("f", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Insn))]
allow = Insn(6, 0, 0, 0x7fff0000)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Prog(1, ctypes.pointer(allow)))) == 0
"""


def obstacles_of(
    it: Helper,
    *,
    caller_pid: int | None = None,
    ghost_limit_bytes: int = GHOST_LIMIT_BYTES,
    link_remap: bool = False,
) -> tuple[Obstacle, ...]:
    return examine(
        ProcessTree.capture(it.pid),
        HELPER_UID,
        caller_pid=caller_pid,
        expected_namespaces=HERE,
        ghost_limit_bytes=ghost_limit_bytes,
        link_remap=link_remap,
    )


def reasons(obstacles: tuple[Obstacle, ...]) -> str:
    return "\n".join(map(str, obstacles))


def about(obstacles: tuple[Obstacle, ...], fd: int) -> list[str]:
    """Reasons that name one descriptor."""
    return [o.reason for o in obstacles if f", fd {fd} " in o.subject]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the helpers' user."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, HELPER_UID, -1)
        yield Path(name)


@pytest.fixture(scope="module")
def plain() -> ProcessTree:
    """A process that has nothing special, and a child."""
    with helper("tell(fork(lambda: None))") as it:
        return ProcessTree.capture(it.pid)


AROUND = Surroundings(namespaces=HERE)


def with_rights(process: Process, rights: Credentials) -> Process:
    threads = tuple(replace(thread, credentials=rights) for thread in process.threads)
    status = replace(process.status, credentials=rights)
    return replace(process, status=status, threads=threads)


def root_obstacles(root: Process, caller_uid: int = HELPER_UID) -> tuple[Obstacle, ...]:
    alone = replace(root, private=replace(root.private, files=()))
    return examine(ProcessTree((alone,)), caller_uid, surroundings=AROUND)


def test_an_ordinary_tree_can_move() -> None:
    code = """
r, w = os.pipe(); a, b = socket.socketpair(); e = select.epoll(); e.register(r)
f = open("/dev/null"); g = open("/dev/urandom"); d = os.open("/", os.O_RDONLY)
m = mmap.mmap(-1, 4096); s = os.memfd_create("x"); v = os.eventfd(0)
p = os.pidfd_open(os.getpid()); t = socket.socket(); u = socket.socket(type=socket.SOCK_DGRAM)
threading.Thread(target=signal.pause, daemon=True).start()
fork(lambda: None)
if not os.fork(): os._exit(0)
"""
    with helper(code) as it:
        assert reasons(obstacles_of(it)) == ""
        report = check(it.pid, HELPER_UID, expected_namespaces=HERE)
    assert report.tree is not None
    assert (report.obstacles, report.notes) == ((), ())


def test_root_may_move_an_ordinary_users_tree() -> None:
    with helper("") as it:
        assert examine(ProcessTree.capture(it.pid), 0, expected_namespaces=HERE) == ()


def test_all_reasons_are_told_at_once() -> None:
    code = """
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
v = os.eventfd(0, os.EFD_SEMAPHORE)
tell(s.fileno(), n.fileno(), v)
"""
    with helper(code) as it:
        found = obstacles_of(it)
    assert [len(about(found, fd)) for fd in it.numbers] == [1, 1, 1]
    assert len(found) == 3


def test_an_obstacle_is_one_line_like_every_error() -> None:
    obstacle = Obstacle("pid 7 (x)", "is gone", "look again")
    assert str(obstacle) == str(obstacle.error()) == "pid 7 (x): is gone; look again"


@pytest.mark.parametrize(
    ("text", "shown"), [("a\nb", "a\\nb"), ("\x1b[2J", "\\x1b[2J"), ("über", "über")]
)
def test_names_chosen_by_others_can_not_write_on_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_stranger_learns_nothing_but_that_it_is_not_his() -> None:
    with helper("s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()") as it:
        (only,) = examine(ProcessTree.capture(it.pid), STRANGER_UID, expected_namespaces=HERE)
        report = check(it.pid, STRANGER_UID, expected_namespaces=HERE)
    assert only.reason == "belongs to another user"
    assert report.tree is None
    assert report.obstacles == (only,)


@pytest.mark.parametrize("field", ["real", "effective", "saved", "filesystem"])
def test_only_one_who_owns_all_its_ids_may_move_it(plain: ProcessTree, field: str) -> None:
    ids = replace(plain.root.credentials.uids, **{field: STRANGER_UID})
    creds = replace(plain.root.credentials, uids=ids)
    root = with_rights(plain.root, creds)
    assert reasons(root_obstacles(root)).count("belongs to another user") == 1
    assert "set-user-ID" in reasons(root_obstacles(root, caller_uid=0))


def test_a_process_protected_against_its_owner_does_not_move_for_him() -> None:
    with helper("libc.prctl(4, 0, 0, 0, 0)") as it:
        (only,) = obstacles_of(it)
    assert "not dumpable" in only.reason


def test_a_set_group_id_program_does_not_move(plain: ProcessTree) -> None:
    creds = replace(plain.root.credentials, gids=Ids(1, 2, 2, 2))
    root = with_rights(plain.root, creds)
    assert "set-group-ID" in reasons(root_obstacles(root))


@pytest.mark.parametrize(
    ("permitted", "refused"), [(0, False), (1 << 35, False), (1, True), (1 << 35 | 2, True)]
)
def test_capabilities_do_not_travel_but_those_of_every_session_do_not_matter(
    plain: ProcessTree, permitted: int, refused: bool
) -> None:
    creds = replace(
        plain.root.credentials, capabilities=Capabilities(0, permitted, permitted, 0, 0)
    )
    root = with_rights(plain.root, creds)
    assert ("has capabilities" in reasons(root_obstacles(root))) is refused


def test_a_thread_with_other_rights_is_named(plain: ProcessTree) -> None:
    main = plain.root.threads[0]
    other = replace(main, tid=main.tid + 1, credentials=replace(main.credentials, groups=(1, 2)))
    root = replace(plain.root, threads=(main, other))
    assert "threads have different rights" in reasons(root_obstacles(root))


def test_a_child_of_another_user_is_named(plain: ProcessTree) -> None:
    child = plain.members[1]
    uid = STRANGER_UID
    creds = replace(child.credentials, uids=Ids(uid, uid, uid, uid))
    tree = ProcessTree((plain.root, with_rights(child, creds)))
    obstacles = examine(tree, HELPER_UID, surroundings=AROUND)
    found = [o for o in obstacles if "another user" in o.reason]
    assert [o.subject for o in found] == [f"pid {child.pid} ({child.comm})"]


def test_pid_1_does_not_move() -> None:
    (only,) = check(1, 0).obstacles
    assert "init process" in only.reason


def test_a_kernel_thread_does_not_move(plain: ProcessTree) -> None:
    (only,) = root_obstacles(replace(plain.root, kernel_thread=True), caller_uid=0)
    assert "kernel thread" in only.reason


def test_a_zombie_does_not_move() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    (only,) = check(ended.pid, os.getuid()).obstacles
    ended.wait()
    assert "zombie" in only.reason


def test_a_process_that_lives_on_in_its_threads_only_does_not_move() -> None:
    code = """
def last():
    tell("ready")
    signal.sigwait([signal.SIGUSR1])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
threading.Thread(target=last).start()
libc.syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""
    with helper(code) as it:
        while not Process.read(it.pid).zombie:
            pass
        (only,) = check(it.pid, HELPER_UID).obstacles
    assert "main thread has ended" in only.reason


def test_a_pid_that_is_gone_is_an_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(UserError, match="no such process"):
        check(ended.pid, 0)


def test_a_tree_that_ends_before_it_is_examined_is_gone() -> None:
    with helper("") as it:
        tree = ProcessTree.capture(it.pid)
    with pytest.raises(UserError, match="no such process"):
        examine(tree, HELPER_UID)


def test_the_shell_of_migrate_itself_does_not_move() -> None:
    with helper("tell(fork(lambda: None))") as it:
        (only,) = obstacles_of(it, caller_pid=it.numbers[0])
        assert obstacles_of(it, caller_pid=os.getpid()) == ()
    assert "migrate command itself" in only.reason


def test_a_traced_process_names_its_tracer() -> None:
    code = """
r, w = os.pipe()
def traced():
    libc.ptrace(0, 0, 0, 0)
    os.write(w, b"x")
tell(fork(traced)); os.read(r, 1)
"""
    with helper(code) as it:
        (only,) = obstacles_of(it)
    assert only.subject.startswith(f"pid {it.numbers[0]} ")
    assert f"traced by pid {it.pid}" in only.reason


def test_a_seccomp_filter_is_named_also_if_only_a_thread_has_it() -> None:
    code = f"""
done = threading.Event()
def confined():
{"".join("    " + line + chr(10) for line in PRIVATE_MEMORY_FILTER.splitlines())}
    done.set()
    signal.pause()
threading.Thread(target=confined, daemon=True).start(); done.wait()
"""
    with helper(code) as it:
        (only,) = obstacles_of(it)
    assert "seccomp" in only.reason


def test_other_namespaces_and_another_root_are_named(place: Path) -> None:
    code = """
tell(libc.unshare(0x10000000))  # CLONE_NEWUSER
libc.prctl(4, 1, 0, 0, 0)
os.chroot(sys.argv[1])
"""
    try:
        with helper(code, place) as it:
            text = reasons(examine(ProcessTree.capture(it.pid), 0, expected_namespaces=HERE))
            theirs = Namespaces.of(it.pid)
            told = examine(ProcessTree.capture(it.pid), 0, expected_namespaces=theirs)
    except AssertionError as error:
        if "PermissionError" in str(error):
            pytest.skip(without("user namespaces for ordinary users"))
        raise
    assert "other namespaces than its host (user)" in text
    assert f"another root directory ({place})" in text
    assert "namespaces" not in reasons(told)


def test_a_32_bit_program_does_not_move(plain: ProcessTree) -> None:
    memory = parse_maps("56555000-56556000 r-xp 0 fe:00 12 /bin/old\n")
    root = replace(plain.root, private=replace(plain.root.private, memory=memory))
    assert "32-bit" in reasons(root_obstacles(root))


@pytest.mark.parametrize(
    ("label", "refused"),
    [
        ("unconfined", False),
        ("", False),
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0", False),
        ("/usr/bin/man (enforce)", True),
    ],
)
def test_a_confined_program_does_not_move(plain: ProcessTree, label: str, refused: bool) -> None:
    root = replace(plain.root, private=replace(plain.root.private, security_label=label))
    assert ("security policy" in reasons(root_obstacles(root))) is refused


def test_a_vfork_parent_is_told_to_try_again_and_a_stuck_one_is_noted(plain: ProcessTree) -> None:
    main = plain.root.threads[0]
    forking = replace(main, state="D", kernel_function="kernel_clone")
    stuck = replace(main, state="D", kernel_function="nfs_wait_bit_killable")
    assert "vfork" in reasons(root_obstacles(replace(plain.root, threads=(forking,))))
    tree = ProcessTree((replace(plain.root, threads=(stuck,)),))
    assert "vfork" not in reasons(root_obstacles(tree.root))
    assert "nfs_wait_bit_killable" in str(notes(tree)[0])


def test_a_stopped_process_can_move() -> None:
    with helper("") as it:
        os.kill(it.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, it.pid, os.WSTOPPED | os.WNOWAIT)
        assert obstacles_of(it) == ()


@pytest.mark.parametrize(
    ("take", "name"),
    [
        ("fcntl.flock(f, fcntl.LOCK_EX)", "a write lock (flock)"),
        ("fcntl.flock(f, fcntl.LOCK_SH)", "a read lock (flock)"),
        ("fcntl.lockf(f, fcntl.LOCK_EX)", "a write lock (fcntl)"),
        (
            "fcntl.fcntl(f, 37, bytes([1]) + bytes(31))  # F_OFD_SETLK, F_WRLCK\nNone",
            "a write lock (open file description)",
        ),
        ("fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)", "a lease"),
    ],
)
def test_a_lock_on_a_file_of_the_home_view_is_named(place: Path, take: str, name: str) -> None:
    code = f"f = open(sys.argv[1] + '/x', 'w'); {take}; tell(f.fileno())"
    with helper(code, place) as it:
        found = obstacles_of(it)
        tree = ProcessTree.capture(it.pid)
        elsewhere = examine(tree, HELPER_UID, expected_namespaces=HERE, in_view=lambda path: False)
    (reason,) = about(found, it.numbers[0])
    assert reason.startswith(f"holds {name}")
    assert elsewhere == ()


def test_a_lock_that_a_child_has_inherited_is_named_once(place: Path) -> None:
    code = "f = open(sys.argv[1] + '/x', 'w'); fcntl.flock(f, 2); tell(f.fileno()); fork(lambda: 0)"
    with helper(code, place) as it:
        assert len(obstacles_of(it)) == 1


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/home/a", True), ("/tmp/x", True), ("/var/tmp/x", True), ("/dev/shm/x", True),
        ("/srv/x", True), ("/libation", True), ("/usr/lib/x", False), ("/etc", False),
        ("/var/lib/x", False), ("/dev/null", False), ("/proc/1", False), ("/lib64/x", False),
    ],
)  # fmt: skip
def test_what_a_user_writes_is_in_the_home_view(path: str, inside: bool) -> None:
    assert default_view(path) is inside


def test_a_deleted_file_is_carried_up_to_the_limit(place: Path) -> None:
    code = """
f = open(sys.argv[1] + "/x", "wb"); f.write(os.urandom(300_000)); f.flush(); os.fsync(f.fileno())
os.unlink(f.name); tell(f.fileno())
"""
    with helper(code, place) as it:
        assert obstacles_of(it, ghost_limit_bytes=1 << 20) == ()
        (reason,) = about(obstacles_of(it, ghost_limit_bytes=200_000), it.numbers[0])
    assert "is deleted and occupies 0.3 MiB" in reason


def test_a_file_deleted_by_one_of_its_names_needs_a_remap(place: Path) -> None:
    code = """
f = open(sys.argv[1] + "/x", "w"); os.link(f.name, f.name + "2"); os.unlink(f.name)
tell(f.fileno())
"""
    with helper(code, place) as it:
        (reason,) = about(obstacles_of(it), it.numbers[0])
        assert obstacles_of(it, link_remap=True) == ()
    assert "name that is deleted" in reason


def test_a_large_deleted_program_is_named() -> None:
    maps = "7f0000000000-7f0000001000 r-xp 0 fe:00 34 /home/a/prog (deleted)\n"
    (file,) = parse_maps(maps).files
    with helper("") as it:
        tree = ProcessTree.capture(it.pid)
    memory = Memory((replace(file, stored_bytes=5 << 20),))
    root = replace(tree.root, private=replace(tree.root.private, memory=memory, files=()))
    text = reasons(examine(ProcessTree((root,)), HELPER_UID, surroundings=AROUND))
    assert "mapped /home/a/prog: is deleted and occupies 5.0 MiB" in text


@pytest.mark.skipif(os.getuid() != 0, reason=without("the right to read map_files"))
def test_the_size_of_a_deleted_mapped_file_is_known(place: Path) -> None:
    code = """
f = open(sys.argv[1] + "/x", "w+b"); f.write(bytes(range(256)) * 400); f.flush()
m = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE); os.fsync(f.fileno()); os.unlink(f.name); f.close()
"""
    with helper(code, place) as it:
        assert "mapped" in reasons(obstacles_of(it, ghost_limit_bytes=50_000))
        assert obstacles_of(it) == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7f0000000000-7f0000001000 rw-s 0 00:01 5 /SYSV00000000 (deleted)", "System V shared"),
        ("7f0000000000-7f0000001000 rw-s 0 00:06 5 /dev/dri/card0", "device memory"),
        ("7f0000000000-7f0000001000 rw-s 0 00:0e 5 anon_inode:[io_uring]", "device memory"),
        ("7f0000000000-7f0000001000 rw-s 0 00:08 5 socket:[77]", "device memory"),
        ("7f0000000000-7f0000001000 r-xp 0 00:00 0 [uprobes]", "uprobes"),
    ],
)
def test_memory_that_belongs_to_the_host_is_named(
    plain: ProcessTree, line: str, reason: str
) -> None:
    root = replace(plain.root, private=replace(plain.root.private, memory=parse_maps(line)))
    assert reason in reasons(root_obstacles(root))


def test_system_v_shared_memory_is_found_in_a_real_process() -> None:
    code = """
i = libc.shmget(0, 4096, 0o600)
libc.shmat.restype = ctypes.c_void_p; libc.shmat(i, None, 0); libc.shmctl(i, 0, None)
"""
    with helper(code) as it:
        (only,) = obstacles_of(it)
    assert "System V shared memory" in only.reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("tell(os.pidfd_open(int(sys.argv[1])))", "is a pidfd of pid"),
        ("tell(os.eventfd(0, os.EFD_SEMAPHORE))", "semaphore"),
        ("tell(os.pipe2(os.O_DIRECT)[1])", "packet mode"),
        ("tell(os.open('/proc/self/ns/net', os.O_RDONLY))", "handle to a namespace"),
        ("tell(os.open(f'/proc/{sys.argv[1]}/stat', os.O_RDONLY))", "tells about pid"),
        ("tell(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach())", "netlink"),
    ],
)
def test_files_that_can_not_move_are_named(code: str, reason: str) -> None:
    with helper(code, os.getpid()) as it:
        found = obstacles_of(it)
    (told,) = about(found, it.numbers[0])
    assert reason in told
    assert len(found) == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FileKind.IO_URING, "io_uring"),
        (FileKind.FANOTIFY, "fanotify"),
        (FileKind.BLOCK, "device of this host"),
        (FileKind.CHAR, "device of this host"),
        (FileKind.OTHER, "CRIU can not dump"),
        (FileKind.SOCKET, "kind that can not move"),
    ],
)
def test_kinds_that_can_not_move_are_named(kind: FileKind, reason: str) -> None:
    with helper("tell(os.eventfd(0))") as it:
        tree = ProcessTree.capture(it.pid)
    (file,) = [f for f in tree.root.files if f.fd == it.numbers[0]]
    odd = replace(file, kind=kind, target="anon_inode:odd", protocol="ODD")
    odd = replace(odd, info=replace(odd.info, mount_id=1))
    root = replace(tree.root, private=replace(tree.root.private, files=(odd,)))
    found = examine(ProcessTree((root,)), HELPER_UID, surroundings=AROUND)
    assert any(reason in told for told in about(found, odd.fd))


def test_a_message_queue_is_named() -> None:
    queue = f"/migrate-test-{os.getpid()}"
    code = """
q = libc.mq_open(sys.argv[1].encode(), 0o102, 0o600, None)  # O_CREAT | O_RDWR
libc.mq_unlink(sys.argv[1].encode()); tell(q)
"""
    with helper(code, queue) as it:
        if it.numbers[0] < 0:
            pytest.skip(without("POSIX message queues"))
        assert len(about(obstacles_of(it), it.numbers[0])) == 1


def test_a_file_on_a_mount_out_of_sight_is_named(plain: ProcessTree) -> None:
    with helper("tell(os.open('/', os.O_RDONLY))") as it:
        tree = ProcessTree.capture(it.pid)
    found = examine(tree, HELPER_UID, surroundings=AROUND)  # a host without any mount
    (reason,) = about(found, it.numbers[0])
    assert "mount that the process can not see" in reason


def test_an_inotify_is_no_obstacle_but_a_note() -> None:
    with helper("tell(libc.inotify_init())") as it:
        assert obstacles_of(it) == ()
        (note,) = notes(ProcessTree.capture(it.pid))
    assert f"fd {it.numbers[0]} anon_inode:inotify: queued events are lost" in str(note)
