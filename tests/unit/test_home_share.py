"""What a capsule has from home and what from its host."""

import os
from pathlib import Path

import msgspec
import pytest
from test_link import OFFER

from agent.home_paths import below, outermost
from agent.home_share import PROGRAM_DIRECTORIES, plan_root
from agent.link import Programs, SystemFile
from agent.programs import MAX_ENTRIES, package_identity, tree_identity

SAME = Programs("packages", ("local", "opt"))
VIEW = Path("/view")


def directories(root: Path, there: Programs, here: Programs, *files: SystemFile) -> tuple[str, ...]:
    """What comes from home of an offer with these programs and files, to a host with this root."""
    offer = msgspec.structs.replace(OFFER, view=("/home",), programs=there, files=files)
    return plan_root(offer, here, VIEW, root).directories


def test_hosts_with_the_same_programs_use_their_own(tmp_path: Path) -> None:
    assert directories(tmp_path, SAME, SAME) == ("/home",)


@pytest.mark.parametrize("there", ["", "others"])
@pytest.mark.parametrize("here", ["", "packages"])
def test_other_or_unknown_packages_bring_all_programs(
    tmp_path: Path, there: str, here: str
) -> None:
    found = directories(tmp_path, Programs(there, ("l", "o")), Programs(here, ("l", "o")))
    assert {"/usr", "/bin", "/lib64", "/opt", "/etc/alternatives"} <= set(found)
    assert "/etc" not in found


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (("local", "opt"), ()),
        (("other", "opt"), ("/usr/local",)),
        (("local", ""), ("/opt",)),
        ((), ("/opt", "/usr/local")),
    ],
)
def test_local_trees_come_from_home_unless_equal(
    tmp_path: Path, there: tuple[str, ...], wanted: tuple[str, ...]
) -> None:
    found = directories(tmp_path, Programs("packages", there), SAME)
    assert sorted(found) == sorted(("/home", *wanted))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host's root directory with one file of 5 bytes, made at the second 1000."""
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/lib.so").write_text("12345")
    os.utime(tmp_path / "usr/lib/lib.so", (1000, 1000))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "files", "more"),
    [
        (SystemFile("/usr/lib/lib.so", 5, 1000), (), ()),
        (SystemFile("/usr/lib/lib.so", 6, 1000), ("/usr/lib/lib.so",), ()),
        (SystemFile("/usr/lib/lib.so", 5, 1001), ("/usr/lib/lib.so",), ()),
        (SystemFile("/usr/lib", -1, 0), (), ()),
        (SystemFile("/var/lib/x", -1, 0), (), ("/var/lib/x",)),
        (SystemFile("/var/lib/x", 7, 0), ("/var/lib/x",), ()),
        (SystemFile("/usr/lib/new.so", 7, 0), (), PROGRAM_DIRECTORIES),
        (SystemFile("/home/alice/x", 7, 0), (), ()),
    ],
)
def test_a_file_that_differs_comes_from_home(
    root: Path, file: SystemFile, files: tuple[str, ...], more: tuple[str, ...]
) -> None:
    offer = msgspec.structs.replace(OFFER, view=("/home",), programs=SAME, files=(file,))
    plan = plan_root(offer, SAME, VIEW, root)
    assert plan.files == files
    assert sorted(plan.directories) == sorted(("/home", *more))


def test_a_directory_in_another_is_not_laid_twice() -> None:
    assert outermost(["/a/b", "/a", "/ab", "/c/d", "/a"]) == ("/a", "/ab", "/c/d")
    assert below("/a/b", ["/a"]) and below("/a", ["/a"]) and not below("/ab", ["/a"])


PARAGRAPH = "Package: {}\nStatus: install ok {}\nArchitecture: amd64\nVersion: {}\n"


def test_packages_are_the_same_whatever_their_order(tmp_path: Path) -> None:
    def identity(*packages: tuple[str, str, str]) -> str:
        (tmp_path / "status").write_text("\n".join(PARAGRAPH.format(*p) for p in packages))
        (tmp_path / "cache").unlink(missing_ok=True)
        return package_identity(tmp_path / "status", tmp_path / "cache")

    one, two = ("bash", "installed", "5"), ("libc6", "installed", "2.41")
    assert identity(one, two) == identity(two, one)
    assert identity(one, two) != identity(one)
    assert identity(one, two) != identity(one, ("libc6", "installed", "2.42"))
    assert identity(one) == identity(one, ("vim", "config-files", "9"))


def test_packages_are_read_again_when_they_change(tmp_path: Path) -> None:
    status, cache = tmp_path / "status", tmp_path / "cache"
    status.write_text(PARAGRAPH.format("bash", "installed", "5"))
    first = package_identity(status, cache)
    assert package_identity(status, cache) == first
    status.write_text(PARAGRAPH.format("bash", "installed", "5.1"))
    assert package_identity(status, cache) != first
    assert package_identity(tmp_path / "none", cache) == ""


def test_a_local_tree_is_its_names_sizes_and_times(tmp_path: Path) -> None:
    def make(name: str, text: str = "x", link: str = "a") -> str:
        top = tmp_path / name
        (top / "bin/__pycache__").mkdir(parents=True)
        (top / "bin/a").write_text(text)
        os.utime(top / "bin/a", (1000, 1000))
        (top / "bin/__pycache__/a.pyc").write_text(name)
        (top / "bin/l").symlink_to(link)
        return tree_identity(top)

    assert make("one") == make("two")
    assert make("three", text="xy") != make("four", link="b") != tree_identity(tmp_path / "one")
    os.utime(tmp_path / "two/bin/a", (1001, 1001))
    assert tree_identity(tmp_path / "one") != tree_identity(tmp_path / "two")
    assert tree_identity(tmp_path / "none") == tree_identity(tmp_path / "one/bin/__pycache__/x")


def test_a_large_local_tree_is_not_compared(tmp_path: Path) -> None:
    for number in range(MAX_ENTRIES + 1):
        (tmp_path / str(number)).touch()
    assert tree_identity(tmp_path) == ""
