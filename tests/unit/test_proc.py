"""What /proc says is read as it stands there, and a snapshot bears with processes that end."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from helper_processes import HELPER_UID, helper

from criu_hooks import tree as tree_module
from criu_hooks.fds import FileKind, classify, parse_fdinfo, parse_lock, parse_locks
from criu_hooks.maps import parse_maps
from criu_hooks.mounts import parse_mountinfo
from criu_hooks.namespaces import Namespaces
from criu_hooks.outside import Holders
from criu_hooks.pipes import external_pipes
from criu_hooks.proc import (
    ancestors,
    boot_id,
    is_kernel_thread,
    parse_cgroup,
    parse_stat,
    parse_status,
    pid_starttime,
)
from criu_hooks.sockets import parse_inet_table
from criu_hooks.tree import Process, ProcessTree
from migrate.errors import UserError

STAT_TAIL = "S 10 20 30 34816 -1 4194304 " + "0 " * 12 + "4711 17342464 3558"


@pytest.mark.parametrize("comm", ["sleep", "a b", ")", ") R 1 1 1", "(x) (", ""])
def test_a_command_name_can_not_forge_the_other_fields(comm: str) -> None:
    stat = parse_stat(f"99 ({comm}) {STAT_TAIL}\n")
    assert (stat.pid, stat.comm, stat.state, stat.ppid, stat.pgid, stat.sid) == (
        99, comm, "S", 10, 20, 30,
    )  # fmt: skip
    assert (stat.tty_nr, stat.starttime_ticks) == (34816, 4711)


@pytest.mark.parametrize("text", ["", "1 (x) S 1", "1 x"])
def test_half_a_stat_line_is_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_stat(text)


STATUS = """Name:\tx
Umask:\t0027
State:\tD (disk sleep)
TracerPid:\t7
Uid:\t1000\t1001\t1002\t1003
Gid:\t100\t101\t102\t103
Groups:\t4 27 1000 
VmRSS:\t    2048 kB
RssAnon:\t     100 kB
RssShmem:\t      20 kB
VmSwap:\t       3 kB
CoreDumping:\t1
Threads:\t5
CapInh:\t0000000800000000
CapPrm:\t0000000000000002
CapEff:\t0000000000000001
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000004
NoNewPrivs:\t1
Seccomp:\t2
"""  # noqa: W291


def test_a_status_is_read_with_its_units() -> None:
    status = parse_status(STATUS)
    mine = status.credentials
    assert (mine.uids.real, mine.uids.effective, mine.uids.saved) == (1000, 1001, 1002)
    assert mine.gids.filesystem == 103
    assert not mine.uids.same
    assert mine.groups == (4, 27, 1000)
    assert (mine.capabilities.permitted, mine.capabilities.ambient) == (2, 4)
    assert mine.no_new_privs
    assert (status.state, status.seccomp, status.tracer_pid, status.umask) == ("D", 2, 7, 0o27)
    assert (status.threads, status.core_dumping) == (5, True)
    assert status.resident_bytes == 2048 * 1024
    assert status.dump_bytes == 123 * 1024


def test_a_zombies_status_has_no_memory() -> None:
    lines = [line for line in STATUS.splitlines() if not line.startswith(("Vm", "Rss", "Core"))]
    assert parse_status("\n".join(lines)).dump_bytes == 0


@pytest.mark.parametrize(
    ("text", "path"),
    [("0::/user.slice/x\n", "/user.slice/x"), ("9:pids:/a\n0::/\n", "/"), ("1:cpu:/a\n", "")],
)
def test_the_cgroup_is_the_one_of_version_2(text: str, path: str) -> None:
    assert parse_cgroup(text) == path


MAPS = """55a000-55b000 r--p 00000000 fe:00 12 /usr/bin/my program
55b000-55c000 r-xp 00001000 fe:00 12 /usr/bin/my program
55d000-55e000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000001000 rw-s 00000000 00:01 33 /dev/zero (deleted)
7f0000001000-7f0000002000 r--s 00000000 fe:00 34 /home/a/old (deleted)
7f0000002000-7f0000003000 rw-s 00000000 00:01 5 /SYSV0000beef (deleted)
7f0000003000-7f0000004000 rw-p 00000000 00:00 0 
7fff00000000-7fff00021000 rw-p 00000000 00:00 0 [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
"""  # noqa: W291


def test_mapped_files_are_told_once_each_and_memory_without_a_file_not_at_all() -> None:
    memory = parse_maps(MAPS)
    program, anonymous, old, sysv = memory.files
    assert (program.path, program.inode, program.executable) == ("/usr/bin/my program", 12, True)
    assert program.device == os.makedev(0xFE, 0)
    assert not program.shared
    assert anonymous.kernel_object
    assert anonymous.shared_writable
    assert (old.path, old.deleted, old.kernel_object) == ("/home/a/old", True, False)
    assert old.shared
    assert not old.shared_writable
    assert sysv.sysv
    assert not memory.thirty_two_bit


def test_a_program_without_memory_above_4_gib_is_a_32_bit_one() -> None:
    text = "56555000-56556000 r-xp 0 fe:00 12 /bin/old\nfffdd000-ffffe000 rw-p 0 00:00 0 [stack]\n"
    assert parse_maps(text).thirty_two_bit


def test_a_process_without_memory_is_no_32_bit_one() -> None:
    assert not parse_maps("").thirty_two_bit


LOCKS = [
    ("1: FLOCK  ADVISORY  WRITE 593 fe:00:2146 0 EOF", "FLOCK", "WRITE", 593, False, None),
    ("2: POSIX  ADVISORY  READ  593 fe:00:2146 10 20", "POSIX", "READ", 593, False, 20),
    ("2: -> POSIX  ADVISORY  WRITE 594 fe:00:2146 0 5", "POSIX", "WRITE", 594, True, 5),
    ("3: OFDLCK ADVISORY  READ  -1 00:1f:2146 0 EOF", "OFDLCK", "READ", -1, False, None),
    ("4: LEASE  ACTIVE    READ  7 fe:00:2146 0 EOF", "LEASE", "READ", 7, False, None),
    ("5: LEASE  BREAKING  UNLCK 7 fe:00:2146 0 EOF", "LEASE", "UNLCK", 7, False, None),
]


@pytest.mark.parametrize(("line", "mechanism", "access", "pid", "waiting", "end"), LOCKS)
def test_locks_are_read(
    line: str, mechanism: str, access: str, pid: int, waiting: bool, end: int | None
) -> None:
    lock = parse_lock(line)
    assert lock is not None
    assert (lock.mechanism, lock.access, lock.pid) == (mechanism, access, pid)
    assert (lock.waiting, lock.end, lock.inode) == (waiting, end, 2146)


def test_proc_locks_is_read_but_for_what_locks_no_file() -> None:
    text = "\n".join(line for line, *_ in LOCKS) + "\n6: POSIX  ADVISORY  WRITE 9 <none>:0 0 EOF\n"
    assert len(parse_locks(text)) == len(LOCKS)


def test_an_fdinfo_is_read() -> None:
    info = parse_fdinfo(
        "pos:\t2105\nflags:\t02100001\nmnt_id:\t27\nino:\t21\n"
        "lock:\t1: FLOCK  ADVISORY  WRITE 593 fe:00:2146 0 EOF\n"
    )
    assert (info.position, info.flags, info.mount_id) == (2105, 0o2100001, 27)
    assert [lock.mechanism for lock in info.locks] == ["FLOCK"]


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("eventfd-semaphore: 1", "semaphore", True),
        ("eventfd-semaphore: 0", "semaphore", False),
        ("Pid:\t-1", "pidfd_pid", -1),
        ("Pid:\t77", "pidfd_pid", 77),
        ("tty-index:\t4", "tty_index", 4),
        ("scm_fds: 2", "descriptors_in_flight", 2),
    ],
)
def test_what_only_some_kinds_tell_is_read(line: str, attribute: str, value: object) -> None:
    assert getattr(parse_fdinfo(f"pos:\t0\nflags:\t02\nmnt_id:\t1\n{line}\n"), attribute) == value


REG, DIR, FIFO, CHR, BLK, SOCK = 0o100644, 0o40755, 0o10600, 0o20666, 0o60660, 0o140777


@pytest.mark.parametrize(
    ("target", "mode", "device", "protocol", "links", "kind"),
    [
        ("/home/a/x", REG, 0, "", 1, FileKind.REGULAR),
        ("/home/a", DIR, 0, "", 2, FileKind.DIRECTORY),
        ("pipe:[7]", FIFO, 0, "", 1, FileKind.PIPE),
        ("/tmp/fifo", FIFO, 0, "", 1, FileKind.FIFO),
        ("socket:[7]", SOCK, 0, "UNIX", 1, FileKind.UNIX),
        ("socket:[7]", SOCK, 0, "UNIX-STREAM", 1, FileKind.UNIX),
        ("socket:[7]", SOCK, 0, "TCPv6", 1, FileKind.INET),
        ("socket:[7]", SOCK, 0, "MPTCP", 1, FileKind.INET),
        ("socket:[7]", SOCK, 0, "NETLINK", 1, FileKind.NETLINK),
        ("socket:[7]", SOCK, 0, "PACKET", 1, FileKind.SOCKET),
        ("socket:[7]", SOCK, 0, "", 1, FileKind.SOCKET),
        ("/dev/pts/3", CHR, os.makedev(136, 3), "", 1, FileKind.TTY),
        ("/dev/pts/300", CHR, os.makedev(136, 300), "", 1, FileKind.TTY),
        ("/dev/tty", CHR, os.makedev(5, 0), "", 1, FileKind.TTY),
        ("/dev/ttyS0", CHR, os.makedev(4, 64), "", 1, FileKind.TTY),
        ("/dev/null", CHR, os.makedev(1, 3), "", 1, FileKind.CHAR),
        ("/dev/fuse", CHR, os.makedev(10, 229), "", 1, FileKind.CHAR),
        ("/dev/sda", BLK, os.makedev(8, 0), "", 1, FileKind.BLOCK),
        ("anon_inode:[eventfd]", 0o600, 0, "", 1, FileKind.EVENTFD),
        ("anon_inode:[eventpoll]", 0o600, 0, "", 1, FileKind.EPOLL),
        ("anon_inode:inotify", 0o600, 0, "", 1, FileKind.INOTIFY),
        ("anon_inode:[fanotify]", 0o600, 0, "", 1, FileKind.FANOTIFY),
        ("anon_inode:[io_uring]", 0o600, 0, "", 1, FileKind.IO_URING),
        ("anon_inode:[pidfd]", 0o600, 0, "", 1, FileKind.PIDFD),
        ("pidfd:[88]", 0o100700, 0, "", 1, FileKind.PIDFD),
        ("anon_inode:bpf-map", 0o600, 0, "", 1, FileKind.OTHER),
        ("anon_inode:[userfaultfd]", REG, 0, "", 1, FileKind.OTHER),
        ("net:[4026531833]", 0o100444, 0, "", 1, FileKind.NAMESPACE),
        ("/memfd:x", REG, 0, "", 0, FileKind.MEMFD),
        ("/memfd:x", REG, 0, "", 1, FileKind.REGULAR),
    ],
)
def test_descriptors_are_told_apart(
    target: str, mode: int, device: int, protocol: str, links: int, kind: FileKind
) -> None:
    assert classify(target, mode, device, protocol, links) is kind


def test_mounts_are_read_with_their_escapes() -> None:
    table = parse_mountinfo(
        "24 1 0:22 / /my\\040disk rw,relatime shared:1 - tmpfs none rw\n"
        "25 24 0:23 / /dev/mqueue rw - mqueue mqueue rw\n"
    )
    assert table.ids == {24, 25}
    assert table.mounts[0].path == "/my disk"
    assert table.devices("mqueue") == {os.makedev(0, 23)}


def test_internet_addresses_are_read() -> None:
    line = (
        "  0: {} {} 01 00000000:00000000 00:00000000 00000000  1000        0 {} 1 0 20 4 30 10 -1"
    )
    four = line.format("0100007F:1F90", "0A00000A:0050", 77)
    six = line.format("00000000000000000000000001000000:0050", "0" * 32 + ":0000", 78)
    (v4,) = parse_inet_table("tcp", f"head\n{four}\n")
    (v6,) = parse_inet_table("tcp6", f"head\n{six}\n")
    assert (v4.local, v4.remote, v4.inode) == ("127.0.0.1:8080", "10.0.0.10:80", 77)
    assert v4.connected
    assert v6.local == "[::1]:80"
    assert not v6.connected


def test_a_snapshot_knows_the_process_itself() -> None:
    with helper("os.umask(0o27); os.chdir('/usr'); t = threading.Thread(target=signal.pause, "
                "daemon=True); t.start(); tell(os.getppid())") as it:  # fmt: skip
        tree = ProcessTree.capture(it.pid)
    root = tree.root
    assert (root.pid, root.ppid, root.sid, root.pgid) == (it.pid, os.getpid(), it.pid, it.pid)
    assert root.ppid == it.numbers[0]
    assert (root.private.cwd, root.private.root) == ("/usr", "/")
    assert root.private.cmdline[1] == "-c"
    assert root.private.exe == os.path.realpath("/proc/self/exe")
    assert root.status.umask == 0o27
    assert len(root.tids) == 2
    assert root.tids[0] == it.pid
    assert root.credentials.uids.real == HELPER_UID
    assert root.dumpable
    assert not root.opaque
    assert root.private.namespaces == Namespaces.of(os.getpid())
    assert root.status.dump_bytes > 0
    assert root.private.exe in {file.path for file in root.private.memory.files}


def test_a_snapshot_has_all_descendants_parents_first() -> None:
    code = "tell(fork(lambda: fork(lambda: None)), fork(lambda: None))"
    with helper(code) as it:
        while len((tree := ProcessTree.capture(it.pid)).members) < 4:
            pass
    seen: set[int] = set()
    for process in tree.members:
        assert process is tree.root or process.ppid in seen
        seen.add(process.pid)
    assert set(it.numbers) <= tree.pids == seen


def test_children_are_found_without_the_kernels_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "_children", lambda proc, tid: None)
    with helper("tell(fork(lambda: None))") as it:
        assert tree_module.children_of(it.pid) == it.numbers


def test_a_zombie_child_is_in_the_snapshot() -> None:
    with helper("p = os.fork()\nif not p: os._exit(0)\n"
                "os.waitid(os.P_PID, p, os.WEXITED | os.WNOWAIT); tell(p)") as it:  # fmt: skip
        zombie = ProcessTree.capture(it.pid).members[1]
    assert zombie.pid == it.numbers[0]
    assert zombie.zombie
    assert zombie.credentials.uids.real == HELPER_UID
    assert zombie.files == ()


def test_members_that_end_meanwhile_are_left_out() -> None:
    code = """
def churn():
    while True:
        p = os.fork()
        if not p: os._exit(0)
        os.waitpid(p, 0)
fork(churn); fork(churn)
"""
    with helper(code) as it:
        for _ in range(60):
            assert ProcessTree.capture(it.pid).root.pid == it.pid


def test_a_member_that_ends_between_listing_and_reading_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with helper("tell(fork(lambda: None))") as it:
        ended = subprocess.Popen(["true"])
        ended.wait()
        monkeypatch.setattr(tree_module, "children_of", lambda pid: (ended.pid, *it.numbers))
        assert ProcessTree.capture(it.pid).pids == {it.pid, *it.numbers}


def test_a_pid_that_is_gone_is_the_users_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(UserError, match=f"pid {ended.pid}: no such process"):
        ProcessTree.capture(ended.pid)


def test_open_files_are_told_with_kind_place_and_position() -> None:
    code = """
f = os.open(sys.argv[1], os.O_RDONLY); os.lseek(f, 5, 0)
tell(f, os.eventfd(1), os.memfd_create("m"), socket.socketpair()[0].detach(), os.pipe()[1])
"""
    with helper(code, "/etc/passwd") as it:
        files = {file.fd: file for file in Process.read(it.pid).files}
    regular, event, memory, unix, pipe = (files[fd] for fd in it.numbers)
    assert (regular.target, regular.info.position) == ("/etc/passwd", 5)
    assert (regular.inode, regular.device) == (
        Path("/etc/passwd").stat().st_ino,
        Path("/etc/passwd").stat().st_dev,
    )
    assert (regular.reads, regular.writes) == (True, False)
    assert event.kind is FileKind.EVENTFD
    assert (memory.kind, memory.deleted) == (FileKind.MEMFD, True)
    assert (unix.kind, unix.protocol) == (FileKind.UNIX, "UNIX-STREAM")
    assert (pipe.reads, pipe.writes) == (False, True)


def test_a_pid_and_its_start_time_name_one_process() -> None:
    assert pid_starttime(os.getpid()) == Process.read(os.getpid()).starttime_ticks > 0
    assert not is_kernel_thread(os.getpid())
    assert len(boot_id()) == 36


def test_ancestors_lead_up_from_a_process() -> None:
    with helper("tell(fork(lambda: None))") as it:
        assert list(ancestors(it.numbers[0]))[:2] == [it.pid, os.getpid()]


def test_a_pipe_to_somebody_outside_is_external_and_one_inside_is_not() -> None:
    with helper("r, w = os.pipe(); tell(r, w)") as it:
        pipes = ProcessTree.capture(it.pid).external_pipes()
    by_fd = {(end.fd): pipe for pipe in pipes for end in pipe.ends}
    assert by_fd[0].direction == "in"
    assert by_fd[1].direction == "out"
    assert by_fd[2] == by_fd[1]
    assert {holder.pid for holder in by_fd[0].outside} == {os.getpid()}
    assert not set(it.numbers) & set(by_fd)


def test_a_pipe_whose_same_end_is_shared_with_a_sibling_is_external() -> None:
    r, w = os.pipe()
    with helper("", keep=[w]) as it:
        os.close(r)
        pipes = ProcessTree.capture(it.pid).external_pipes()
        os.close(w)
        later = ProcessTree.capture(it.pid).external_pipes()
    (shared,) = [pipe for pipe in pipes if w in {end.fd for end in pipe.ends}]
    assert shared.direction == "out"
    assert [holder.fd for holder in shared.outside] == [w]
    assert not any(pipe.outside for pipe in later if w in {end.fd for end in pipe.ends})


def test_a_pipe_with_both_ends_inside_and_one_outside_says_so() -> None:
    r, w = os.pipe()
    try:
        with helper("", keep=[r, w]) as it:
            os.close(w)
            pipes = ProcessTree.capture(it.pid).external_pipes()
    finally:
        os.close(r)
    (both,) = [pipe for pipe in pipes if r in {end.fd for end in pipe.ends}]
    assert both.direction == "both"
    assert both.key == f"pipe:[{both.inode}]"


@pytest.mark.parametrize(("complete", "expected"), [(True, 0), (False, 1)])
def test_a_half_pipe_counts_as_external_if_somebody_could_not_be_looked_at(
    complete: bool, expected: int
) -> None:
    with helper("r, w = os.pipe(); os.close(r); tell(w)") as it:
        files = [f for f in Process.read(it.pid).files if f.fd == it.numbers[0]]
    assert len(external_pipes([(it.pid, files[0])], Holders(complete))) == expected


def test_a_stopped_process_can_be_read() -> None:
    with helper("") as it:
        os.kill(it.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, it.pid, os.WSTOPPED | os.WNOWAIT)
        assert Process.read(it.pid).state == "T"
