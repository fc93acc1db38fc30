"""CRIU's log, which has many errors, in the one sentence that tells the cause."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_hooks.log import cause

OTHER_BINARY = """\
rlimit: RLIMIT_NOFILE unlimited for self
Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
  6699: Error (criu/files-reg.c:2175): File usr/bin/python3.13 has bad size 6831736 (expect 6831704)
  6699: Error (criu/mem.c:1433): `- Can't open vma
Error (criu/cr-restore.c:1262): 6699 killed by signal 9: Killed
Error (criu/cr-restore.c:2324): Restoring FAILED.
"""
OTHER_BUILD = """\
(00.013407)   6699: Error (criu/files-reg.c:2153): File usr/lib/libm.so.6 has bad build-ID
(00.020001) Error (criu/cr-restore.c:2324): Restoring FAILED.
"""
MISSING_FILE = """\
(00.010112)   6699: Error (criu/files-reg.c:2353): Can't open file home/alice/out.log on restore: No such file
(00.010130)   6699: Error (criu/files-reg.c:2267): Can't open file home/alice/out.log: No such file or directory
(00.020001) Error (criu/cr-restore.c:2324): Restoring FAILED.
"""
LOOKUP = """\
(00.002310) Error (criu/files-reg.c:1790): Can't lookup mount=1432 for fd=3 path=/mnt/usb/data
(00.002340) Error (criu/cr-dump.c:1635): Dump files (pid: 6699) failed with -1
(00.004000) Error (criu/cr-dump.c:2128): Dumping FAILED.
"""
GHOST = """\
Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/scratch (deleted) of 209715200 size, increase limit
Error (criu/cr-dump.c:2128): Dumping FAILED.
"""
UNKNOWN = """\
(00.001000) Warn  (criu/kerndat.c:1470): $XDG_RUNTIME_DIR not set
(00.003141) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.003300) Error (compel/arch/x86/src/lib/infect.c:617): Can't dump task 6699 with LDT descriptors
(00.003412) Error (criu/sk-netlink.c:78): netlink: The socket has data to read
(00.004000) Error (criu/cr-dump.c:2128): Dumping FAILED.
"""


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (OTHER_BINARY, "/usr/bin/python3.13 is not the same file on both hosts"),
        (OTHER_BUILD, "/usr/lib/libm.so.6 is not the same file on both hosts"),
        (MISSING_FILE, "/home/alice/out.log cannot be opened at the destination"),
        (LOOKUP, "it has a file open on a file system that is not visible here"),
        (GHOST, "it holds a deleted file that is too large"),
        (UNKNOWN, "CRIU: netlink: The socket has data to read"),
    ],
)
def test_the_cause_is_found_among_the_consequences(log: str, sentence: str) -> None:
    assert cause(log) == sentence


@pytest.mark.parametrize(
    "prefix",
    ["", "(00.008932) ", "(123.00893) ", "  6699: ", "(00.008932)   6699: ", "(00.0089) pie: 1: "],
)
def test_every_prefix_of_criu_is_understood(prefix: str) -> None:
    line = f"{prefix}Error (criu/pie/restorer.c:1234): Can't restore timers -22"
    assert cause(line) == "CRIU: Can't restore timers -22"


def test_a_known_cause_counts_more_than_an_earlier_unknown_error() -> None:
    log = "Error (criu/tty.c:1): tty: odd\n" + OTHER_BINARY
    assert cause(log) == "/usr/bin/python3.13 is not the same file on both hosts"


def test_a_path_may_have_spaces_and_colons() -> None:
    log = "Error (criu/files-reg.c:2267): Can't open file home/alice/a b: c: Permission denied"
    assert cause(log) == "/home/alice/a b: c cannot be opened at the destination"
    log = "Error (criu/files-reg.c:2175): File home/alice/a b.so has bad size 2 (expect 1)"
    assert cause(log) == "/home/alice/a b.so is not the same file on both hosts"


def test_a_watch_that_cannot_be_moved_is_a_cause_and_a_notification_is_none() -> None:
    log = """\
Error (criu/cr-service.c:280): RPC: notify post-dump failed
Error (criu/fsnotify.c:380): fsnotify: Can't dump that handle
Error (criu/cr-dump.c:2128): Dumping FAILED.
"""
    assert cause(log) == "CRIU: fsnotify: Can't dump that handle"


def test_if_all_are_consequences_the_first_is_better_than_nothing() -> None:
    log = "Error (criu/cr-restore.c:1262): 5 killed by signal 11: Segmentation fault\n"
    log += "Error (criu/cr-restore.c:2324): Restoring FAILED.\n"
    assert cause(log) == "CRIU: 5 killed by signal 11: Segmentation fault"


@pytest.mark.parametrize(
    "log", ["", "\n\n", "Warn  (criu/x.c:1): odd\n(00.1) Dumping finished successfully\n", "Error"]
)
def test_a_log_without_errors_tells_no_cause(log: str) -> None:
    assert cause(log) == ""


@given(
    st.lists(
        st.one_of(
            st.text(max_size=60),
            st.sampled_from(OTHER_BINARY.splitlines() + UNKNOWN.splitlines()),
            st.text(max_size=40).map(lambda text: f"Error (criu/x.c:1): {text}"),
        ),
        max_size=8,
    )
)
def test_it_is_one_line_whatever_the_log_says(lines: list[str]) -> None:
    sentence = cause("\n".join(lines))
    assert len(sentence.splitlines()) <= 1
