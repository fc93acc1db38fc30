"""Images that name what no guest may have are refused, whatever else they hold."""

import os
from pathlib import Path
from typing import Any

import pytest
from criu_images import (
    CHILD,
    GID,
    GROUP,
    PID,
    UID,
    encode,
    entry,
    fown,
    ids,
    memory,
    regular,
    vma,
    write,
    write_process,
)

from criu_hooks import image_kinds as kinds
from criu_hooks.image_check import Checked, check_images
from criu_hooks.image_format import ImageError
from criu_hooks.image_names import Wanted
from criu_hooks.images import Owner

R, W, X = os.R_OK, os.W_OK, os.X_OK
FILE_PRIVATE, FILE_SHARED = 1 << 6, 1 << 7
OPTIONS = encode(kinds.SOCKET_OPTIONS, so_sndbuf=1, so_rcvbuf=1)


def check(directory: Path) -> Checked:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return check_images(fd, Owner(UID, frozenset({GID, GROUP})))
    finally:
        os.close(fd)


def refused(directory: Path, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        check(directory)


def test_a_plain_process_passes_and_its_files_are_wanted(tmp_path: Path) -> None:
    write_process(tmp_path)
    found = check(tmp_path)
    assert set(found.wanted) == {
        Wanted("/usr/bin/python3.13", R),
        Wanted("/home/alice", X),
        Wanted("/", X),
        Wanted("/dev/null", R | W),
    }
    assert found.mapped == {1}


@pytest.mark.parametrize(
    "name",
    [
        *("mountpoints-12.img", "netns-9.img", "utsns-3.img", "userns-1.img", "ipcns-shm-1.img"),
        *("tcp-stream-1f.img", "reg-files.img", "unixsk.img", "creds-73.img", "tunfile.img"),
        *("core-073.img", "core-73x.img", "ghost-file-0a.img", "cpuinfo.img", "apparmor.img"),
    ],
)
def test_an_image_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    write_process(tmp_path)
    write(tmp_path, name)
    refused(tmp_path, "is no image that a guest has")


def test_images_without_a_process_are_refused(tmp_path: Path) -> None:
    write_process(tmp_path)
    for path in tmp_path.glob("core-*"):
        path.unlink()
    refused(tmp_path, "no process")


# ---------------------------------------------------------------------- namespaces


@pytest.mark.parametrize("name", ["pid", "net", "ipc", "uts", "mnt", "user", "cgroup"])
def test_nobody_gets_namespaces(tmp_path: Path, name: str) -> None:
    write_process(tmp_path)
    write(tmp_path, f"ids-{PID}.img", ids(**{f"{name}_ns_id": 2}))
    refused(tmp_path, "namespaces of its own")


@pytest.mark.parametrize(
    "inventory",
    [
        {"img_version": 1, "root_ids": ids()},
        {"img_version": 2, "root_ids": ids(), "dump_criu_run_id": "x; flush ruleset"},
        {"root_ids": ids()},
    ],
)
def test_a_strange_inventory_is_refused(tmp_path: Path, inventory: dict[str, Any]) -> None:
    write_process(tmp_path)
    write(tmp_path, "inventory.img", encode(kinds.INVENTORY, **inventory))
    refused(tmp_path, "the inventory")


def test_the_root_directory_is_the_capsules(tmp_path: Path) -> None:
    write_process(tmp_path)
    write(tmp_path, f"fs-{PID}.img", encode(kinds.FS, cwd_id=3, root_id=2, umask=0))
    refused(tmp_path, "another root directory")


# ---------------------------------------------------------------------- files with names


@pytest.mark.parametrize(
    ("flags", "access"),
    [
        (os.O_RDONLY | os.O_DIRECTORY, R),
        (os.O_WRONLY | os.O_APPEND, W),
        (os.O_RDWR | os.O_NONBLOCK, R | W),
        (os.O_PATH, 0),
    ],
)
def test_what_opening_takes(tmp_path: Path, flags: int, access: int) -> None:
    write_process(tmp_path, regular(9, "/etc/shadow", flags))
    assert Wanted("/etc/shadow", access) in check(tmp_path).wanted


@pytest.mark.parametrize("flags", [os.O_CREAT, os.O_TRUNC | os.O_WRONLY])
def test_opening_makes_and_empties_nothing(tmp_path: Path, flags: int) -> None:
    write_process(tmp_path, regular(9, "/etc/nologin", flags))
    refused(tmp_path, "made or emptied")


@pytest.mark.parametrize(
    "name",
    [
        *("etc/shadow", "//etc/shadow", "/home/../etc/shadow", "/home/./x", "/home/", "", "x"),
        "/" + "a/" * 3000 + "a",
    ],
)
def test_a_path_has_one_meaning(tmp_path: Path, name: str) -> None:
    write_process(tmp_path, regular(9, name))
    refused(tmp_path, "path")


def test_a_path_has_no_zero_byte(tmp_path: Path) -> None:
    write_process(tmp_path, regular(9, b"/etc/shadow\0/home/alice"))
    refused(tmp_path, "zero byte")


@pytest.mark.parametrize(
    "name",
    [
        *("/proc/1/mem", "/proc/1/status", f"/proc/{PID}/mem", f"/proc/{PID}/root/etc/shadow"),
        *("/proc/kallsyms", "/proc/sys/kernel/core_pattern", "/proc/self/status"),
        *(f"/proc/{PID}/pagemap", f"/proc/{PID}/task/1/status", f"/proc/{PID}/attr/current"),
        *("/dev/sda", "/dev/mem", "/dev/fd/3", "/dev/stdin", "/dev/kmsg", "/dev/pts/../sda"),
    ],
)
def test_files_of_the_kernel_that_are_not_for_guests(tmp_path: Path, name: str) -> None:
    write_process(tmp_path, regular(9, name))
    refused(tmp_path, "not for a guest|no absolute path")


@pytest.mark.parametrize(
    "name",
    [
        *("/proc/meminfo", "/proc", f"/proc/{PID}", f"/proc/{PID}/status", "/dev/pts/4"),
        f"/proc/{PID}/task/{PID + 1}/stat",
    ],
)
def test_files_of_the_kernel_that_all_may_read(tmp_path: Path, name: str) -> None:
    write_process(tmp_path, regular(9, name))
    assert len(check(tmp_path).wanted) == 4


def test_nothing_in_proc_is_written(tmp_path: Path) -> None:
    write_process(tmp_path, regular(9, f"/proc/{PID}/comm", os.O_WRONLY))
    refused(tmp_path, "not for a guest")


def test_files_on_mounts_of_their_own_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    write_process(tmp_path, regular(9, "/x", mnt_id=8))
    refused(tmp_path, "mount of its own")
    write_process(tmp_path, regular(9, "/x", ext=1))
    refused(tmp_path, "mount of its own")


def test_a_mapping_takes_what_its_own_flags_say(tmp_path: Path) -> None:
    write_process(tmp_path, regular(8, "/srv/a"), regular(9, "/srv/b"), regular(10, "/srv/c"))
    maps = [
        vma(8, FILE_SHARED, fdflags=os.O_RDWR),
        vma(9, FILE_PRIVATE),
        vma(10, FILE_SHARED, fdflags=None, prot=3),
    ]
    write(tmp_path, f"mm-{PID}.img", memory(1, *maps))
    found = check(tmp_path)
    assert {Wanted("/srv/a", R | W), Wanted("/srv/b", R), Wanted("/srv/c", R | W)} <= {
        *found.wanted
    }
    assert found.mapped == {1, 8, 9, 10}


@pytest.mark.parametrize("bit", [10, 11, 17, 27])
def test_special_memory_is_refused(tmp_path: Path, bit: int) -> None:
    write_process(tmp_path)
    write(tmp_path, f"mm-{PID}.img", memory(1, vma(1, 1 << bit)))
    refused(tmp_path, "maps")


def test_a_mapping_may_not_empty_a_file(tmp_path: Path) -> None:
    write_process(tmp_path)
    write(tmp_path, f"mm-{PID}.img", memory(1, vma(1, FILE_PRIVATE, fdflags=os.O_TRUNC)))
    refused(tmp_path, "made or emptied")


def test_a_working_directory_that_is_open_too_must_be_readable(tmp_path: Path) -> None:
    write_process(tmp_path)
    write(tmp_path, "fdinfo-3.img", encode(kinds.FDINFO, id=2, flags=0, type=1, fd=5))
    assert Wanted("/home/alice", R) in check(tmp_path).wanted


# ---------------------------------------------------------------------- files that have no name


def ghost(**changes: Any) -> bytes:
    return encode(kinds.GHOST, **{"uid": UID, "gid": GID, "mode": 0o100600, **changes})


def write_ghost(directory: Path, path: str = "/run/user/1001/x", **changes: Any) -> None:
    write_process(directory, regular(9, path, os.O_RDWR))
    write(directory, "remap-fpath.img", encode(kinds.REMAP, orig_id=9, remap_id=10, remap_type=1))
    write(directory, "ghost-file-a.img", ghost(**changes), rest=b"whatever it held")


def test_a_deleted_file_is_made_where_its_owner_may_make_one(tmp_path: Path) -> None:
    write_ghost(tmp_path)
    wanted = check(tmp_path).wanted
    assert Wanted("/run/user/1001/x", makes=True) in wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"uid": 0}, "another user"),
        ({"gid": 0}, "another user"),
        ({"mode": 0o104755}, "special rights"),
        ({"mode": 0o102755}, "special rights"),
        ({"mode": 0o020666, "rdev": 0x801}, "no plain file"),
        ({"mode": 0o060666, "rdev": 0x801}, "no plain file"),
        ({"mode": 0o120777, "symlnk_target": "/etc"}, "no plain file"),
    ],
)
def test_a_deleted_file_is_plain_and_the_owners(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_ghost(tmp_path, **changes)
    refused(tmp_path, reason)


def test_nothing_is_made_among_devices(tmp_path: Path) -> None:
    write_ghost(tmp_path, "/dev/x")
    refused(tmp_path, "would be made")


def test_both_names_of_a_renamed_file_are_the_owners_to_make(tmp_path: Path) -> None:
    write_process(tmp_path, regular(9, "/srv/old"), regular(10, "/srv/link_remap.10"))
    write(tmp_path, "remap-fpath.img", encode(kinds.REMAP, orig_id=9, remap_id=10, remap_type=0))
    wanted = check(tmp_path).wanted
    assert {Wanted("/srv/old", makes=True), Wanted("/srv/link_remap.10", makes=True)} <= {*wanted}


@pytest.mark.parametrize("kind", [None, 2, 3, 77])
def test_other_ways_to_lose_a_name_are_refused(tmp_path: Path, kind: int | None) -> None:
    write_process(tmp_path, regular(9, "/srv/old"))
    remap = encode(kinds.REMAP, orig_id=9, remap_id=10, remap_type=kind)
    write(tmp_path, "remap-fpath.img", remap)
    refused(tmp_path, "lost its name")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"uid": 0}, "another user"), ({"mode": 0o104777}, "special rights")],
)
def test_memory_files_are_plain_and_the_owners(
    tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    write_process(tmp_path)
    fields = {"name": "x", "uid": UID, "gid": GID, "size": 0, "mode": 0o100777, **changes}
    write(tmp_path, "memfd.img", encode(kinds.MEMFD_INODE, **fields))
    refused(tmp_path, reason)


# ---------------------------------------------------------------------- other open files


@pytest.mark.parametrize(
    "other",
    [
        entry(13, 9, nlsk=b""),
        entry(10, 9, psk=b""),
        entry(12, 9, ffy=b""),
        entry(14, 9, nsf=b""),
        entry(15, 9, tunf=b""),
        entry(16, 9, ext=b""),
        entry(19, 9, bpf=b""),
        entry(99, 9, reg=b""),
        entry(1, 9),
        entry(2, 9, reg=b""),
        entry(1, 9, reg=b"", ext=b""),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, other: bytes) -> None:
    write_process(tmp_path, other)
    refused(tmp_path, "kind that no guest has")


@pytest.mark.parametrize("who", [{"uid": 0, "euid": 0}, {"uid": UID, "euid": 0}])
def test_signals_of_files_come_from_the_owner(tmp_path: Path, who: dict[str, int]) -> None:
    mine = fown(pid=PID, signum=9, uid=UID, euid=UID)
    write_process(tmp_path, regular(9, "/x", fown=mine))
    check(tmp_path)
    write_process(tmp_path, regular(9, "/x", fown=fown(pid=1, signum=9, **who)))
    refused(tmp_path, "signals as another")


def inet(**changes: Any) -> bytes:
    fields = {"id": 9, "family": 2, "type": 1, "proto": 6, "state": 7, "fown": fown()}
    return entry(4, 9, isk=encode(kinds.INET, **{**fields, "opts": OPTIONS, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"src_port": 22},
        {"dst_port": 22},
        {"state": 10},
        {"state": 1},
        {"type": 3},
        {"type": 2, "proto": 255},
        {"family": 17},
        {"opts": encode(kinds.SOCKET_OPTIONS, so_mark=1)},
        {"opts": encode(kinds.SOCKET_OPTIONS, so_bound_dev="eth0")},
        {"opts": encode(kinds.SOCKET_OPTIONS, so_priority=7)},
    ],
)
def test_an_internet_socket_is_new_and_plain(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_process(tmp_path, inet())
    check(tmp_path)
    write_process(tmp_path, inet(**changes))
    refused(tmp_path, "a socket")


def unix(**changes: Any) -> bytes:
    fields = {"id": 9, "type": 1, "state": 1, "uflags": 0, "fown": fown(), "opts": OPTIONS}
    return entry(5, 9, usk=encode(kinds.UNIX, **{**fields, "name": b"", **changes}))


@pytest.mark.parametrize(
    ("names", "path"),
    [
        ({"name": b"/run/a"}, "/run/a"),
        ({"name": b"/run/a\0"}, "/run/a"),
        ({"name": b"b/a", "name_dir": "/run"}, "/run/b/a"),
        ({"name": b"/run/a", "name_dir": "/home"}, "/run/a"),
    ],
)
def test_the_name_of_a_unix_socket_is_the_owners_to_make(
    tmp_path: Path, names: dict[str, Any], path: str
) -> None:
    write_process(tmp_path, unix(**names))
    assert Wanted(path, makes=True) in check(tmp_path).wanted


def test_an_abstract_name_takes_nothing(tmp_path: Path) -> None:
    write_process(tmp_path, unix(name=b"\0x"))
    assert len(check(tmp_path).wanted) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"uflags": 1},
        {"name": b"a"},
        {"name": b"/run/a\0b"},
        {"name": b"../x", "name_dir": "/run"},
        {"file_perms": encode(kinds.FILE_PERMISSIONS, mode=0o777, uid=0, gid=GID)},
        {"file_perms": encode(kinds.FILE_PERMISSIONS, mode=0o777, uid=UID, gid=0)},
        {"file_perms": encode(kinds.FILE_PERMISSIONS, mode=0o4777, uid=UID, gid=GID)},
    ],
)
def test_other_unix_sockets_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_process(tmp_path, unix(**changes))
    refused(tmp_path, "unix socket|absolute path")


def tty(**changes: Any) -> bytes:
    fields = {"id": 9, "tty_info_id": 1, "flags": 2, "fown": fown(), **changes}
    return entry(11, 9, tty=encode(kinds.TTY, **fields))


def test_only_of_a_terminal_criu_sets_the_mode(tmp_path: Path) -> None:
    write_process(tmp_path, tty(regf_id=10), regular(10, "/etc/passwd", mode=0o100666))
    refused(tmp_path, "no terminal")
    write_process(tmp_path, tty(), regular(9, "/dev/tty", 2, mode=0o20666))
    assert Wanted("/dev/tty", R | W, mode=0o20666) in check(tmp_path).wanted


@pytest.mark.parametrize("info", [{"type": 2}, {"type": 3}, {"type": 1, "uid": 0}, {}])
def test_terminals_of_the_host_are_refused(tmp_path: Path, info: dict[str, int]) -> None:
    write_process(tmp_path)
    write(tmp_path, "tty-info.img", encode(kinds.TTY_INFO, id=1, **info))
    refused(tmp_path, "a terminal")


def test_a_pidfd_is_of_the_tree(tmp_path: Path) -> None:
    for pid in (PID, -1):
        write_process(tmp_path, entry(20, 9, pidfd=encode(kinds.PIDFD, id=9, nspid=pid)))
        check(tmp_path)
    write_process(tmp_path, entry(20, 9, pidfd=encode(kinds.PIDFD, id=9, nspid=CHILD)))
    refused(tmp_path, "outside of the images")


def test_a_watch_is_of_a_path(tmp_path: Path) -> None:
    def watching(**handle: Any) -> bytes:
        watch = encode(kinds.INOTIFY_WATCH, id=9, f_handle=encode(kinds.FILE_HANDLE, **handle))
        return entry(8, 9, ify=encode(kinds.INOTIFY, id=9, wd=watch))

    write_process(tmp_path, watching(path="/root/x"))
    assert Wanted("/root/x", R) in check(tmp_path).wanted
    write_process(tmp_path, watching(handle=[1, 2]))
    refused(tmp_path, "names no path")


def test_no_descriptors_are_on_their_way(tmp_path: Path) -> None:
    write_process(tmp_path)
    plain = encode(kinds.SOCKET_PACKET, id_for=1, length=3)
    loaded = encode(kinds.SOCKET_PACKET, id_for=1, length=0, scm=b"\x08\x01")
    queue = b"abc" + len(loaded).to_bytes(4, "little") + loaded
    write(tmp_path, "sk-queues.img", plain, rest=b"abc")
    check(tmp_path)
    write(tmp_path, "sk-queues.img", plain, rest=queue)
    refused(tmp_path, "on their way")
