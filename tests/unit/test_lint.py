"""The tree is clean: linters, types, which package imports which, no registry named."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
# What each package must not import, however deep inside a function it stands.
FORBIDDEN = {
    "migrate": {"agent", "criu_hooks", "paramiko", "pycriu", "psutil"},
    "criu_hooks": {"agent", "paramiko"},
}
REGISTRY = re.compile(
    r"\b(debian|pypi|pythonhosted|npmjs|rubygems|crates|golang)\.(org|net|com|io)\b"
)
# Of no checkout's own making.
GENERATED = {"__pycache__", "build", "dist"}


def run(*arguments: str) -> None:
    """A tool of this Python, over the checkout; its output is the failure's text."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def tree(top: Path = CHECKOUT) -> Iterator[Path]:
    """Every file of the checkout that somebody wrote."""
    for path in top.iterdir():
        generated = path.name in GENERATED or path.suffix == ".egg-info"
        if generated or (path.name.startswith(".") and path.name not in (".ci", ".gitignore")):
            continue
        if path.is_dir():
            yield from tree(path)
        elif path.is_file():
            yield path


def imports(source: str) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_the_code_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_the_types_fit() -> None:
    run("mypy")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(CHECKOUT)): sorted(bad)
        for path in (CHECKOUT / package).rglob("*.py")
        if (bad := imports(path.read_text()) & FORBIDDEN[package])
    }
    assert not wrong


@pytest.mark.parametrize("program", ["migrate.cli", "migrate.admin"])
def test_what_a_user_types_loads_nothing_slow(program: str) -> None:
    script = f"import sys, {program}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "migrate" in loaded
    assert not loaded & {"paramiko", "cryptography", "google", "pycriu", "psutil", "asyncio"}


def test_no_registry_is_named() -> None:
    wrong = {
        str(path.relative_to(CHECKOUT)): found[0]
        for path in tree()
        if (found := REGISTRY.search(path.read_text(errors="replace")))
    }
    assert not wrong


def test_the_checks_see_what_they_look_for() -> None:
    assert imports("def f():\n    import agent.x\n    from pycriu import rpc") == {
        "agent",
        "pycriu",
    }
    assert REGISTRY.search("https://" + "deb.debian" + ".org/")
    assert Path(__file__) in set(tree())
