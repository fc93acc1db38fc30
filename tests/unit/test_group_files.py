"""The files `PID/miggroup`, without a kernel that mounts them: as libfuse calls them."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.group_files import GroupFiles, Process, parse_group, replace_others
from agent.group_words import Get, Identity, Put

STRANGER = 4242


class Files:
    """The files, with a book of numbers behind them; `uid` is who calls."""

    def __init__(self) -> None:
        self.uid = 0
        self.numbers: dict[Identity, int] = {}
        self.files = GroupFiles(self._answer, lambda: self.uid, lambda: None)

    def _answer(self, question: Get | Put) -> int:
        if isinstance(question, Put):
            self.numbers[question.process] = question.group
        return self.numbers.get(question.process, 0)

    def read(self, path: str) -> bytes:
        handle = self.files.open(path, os.O_RDONLY)
        try:
            return self.files.read(path, 4096, 0, handle)
        finally:
            self.files.release(path, handle)

    def write(self, path: str, data: bytes) -> int:
        handle = self.files.open(path, os.O_WRONLY)
        try:
            return self.files.write(path, data, 0, handle)
        finally:
            self.files.release(path, handle)


@pytest.fixture
def served() -> Files:
    return Files()


@pytest.fixture
def process() -> Iterator[int]:
    """The pid of a process."""
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        yield sleeper.pid
        sleeper.kill()


def fails(error: int) -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda raised: raised.errno == error)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"0", 0),
        (b"1\n", 1),
        (b"2147483647\n", 2147483647),
        (b"0000000000000000000012", 12),
    ],
)
def test_a_decimal_number_is_a_group(data: bytes, number: int) -> None:
    assert parse_group(data) == number


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"-1",
        b"2147483648",
        b"0x1",
        b"1 2",
        b" 1",
        b"1\n\n",
        b"1\0",
        b"99999999999",
        "١".encode(),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with fails(errno.EINVAL):
        parse_group(data)


def test_what_is_written_is_read(served: Files, process: int) -> None:
    path = f"/{process}/miggroup"
    assert served.read(path) == b"0\n"
    assert served.write(path, b"17\n") == 3
    assert served.read(path) == b"17\n"


def test_what_is_no_number_changes_nothing(served: Files, process: int) -> None:
    path = f"/{process}/miggroup"
    served.write(path, b"17")
    with fails(errno.EINVAL):
        served.write(path, b"18 or so")
    assert served.read(path) == b"17\n"


def test_a_shell_may_truncate_before_it_writes(served: Files, process: int) -> None:
    path = f"/{process}/miggroup"
    served.write(path, b"17")
    served.files.truncate(path, 0)
    assert served.read(path) == b"17\n"


def test_only_its_owner_and_root_may_write(served: Files, process: int) -> None:
    path = f"/{process}/miggroup"
    served.uid = STRANGER
    with fails(errno.EPERM):
        served.files.open(path, os.O_WRONLY)
    with fails(errno.EPERM):
        served.files.open(path, os.O_RDWR)
    with fails(errno.EPERM):
        served.files.truncate(path, 0)
    with fails(errno.EACCES):
        served.files.access(path, os.W_OK)
    assert served.read(path) == b"0\n"
    served.uid = os.getuid()
    assert served.write(path, b"1") == 1


@pytest.mark.parametrize(
    "change", ["chmod", "unlink", "mkdir", "rmdir", "rename", "create", "symlink", "link"]
)
def test_nothing_else_can_be_changed(served: Files, process: int, change: str) -> None:
    with fails(errno.EPERM):
        getattr(served.files, change)(f"/{process}/miggroup", 0)


def test_an_open_file_does_not_reach_the_next_process_of_its_pid(
    served: Files, process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/{process}/miggroup"
    handle = served.files.open(path, os.O_RDWR)
    served.files.write(path, b"17", 0, handle)
    real = Process.look(process)
    later = Identity(process, real.identity.starttime_ticks + 1)
    monkeypatch.setattr(Process, "look", lambda pid: Process(later, real.uid, real.gid))
    with fails(errno.ESRCH):
        served.files.read(path, 4096, 0, handle)
    with fails(errno.ESRCH):
        served.files.write(path, b"18", 0, handle)
    # It starts in no group.
    assert served.read(path) == b"0\n"


def test_gone_processes_vanish(served: Files) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        assert str(sleeper.pid) in served.files.readdir("/", 0)
        assert list(served.files.readdir(f"/{sleeper.pid}", 0)) == [".", "..", "miggroup"]
        sleeper.kill()
    assert str(sleeper.pid) not in served.files.readdir("/", 0)
    with fails(errno.ENOENT):
        served.files.getattr(f"/{sleeper.pid}/miggroup")
    with fails(errno.ENOENT):
        served.files.open(f"/{sleeper.pid}/miggroup", os.O_RDONLY)


def test_a_thread_is_no_process(served: Files) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert served.files.getattr(f"/{os.getpid()}")
        with fails(errno.ENOENT):
            served.files.getattr(f"/{thread.native_id}")
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    "path", ["/self", "/0", "/-1", "/01", "/99999999999", "/1/stat", "/1/miggroup/x"]
)
def test_nothing_else_is_there(served: Files, path: str) -> None:
    with fails(errno.ENOENT):
        served.files.getattr(path)


def test_who_served_them_before_is_ended(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from agent.group_files import replace_others;"
        "replace_others(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True
    ) as earlier:
        assert earlier.stdout is not None
        assert earlier.stdout.readline() == "locked\n"
        os.close(replace_others(lock))
        assert earlier.wait(60) == -signal.SIGKILL
