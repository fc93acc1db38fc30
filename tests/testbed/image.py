"""The nodes' image, in layers: Debian with CRIU, the product's dependencies, the product itself."""

import os
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from testbed import layers
from testbed.errors import TestbedError
from testbed.instance import CHECKOUT, cache_root
from testbed.layers import layer, run_outside
from testbed.sandbox import Sandbox, run_in_image

SUITE = "trixie"
PACKAGES = (
    "openssh-server",
    "openssh-client",
    "openssh-sftp-server",
    "sshfs",
    "fuse3",
    "python3",
    "python3-venv",
    "tini",
    "procps",
    "psmisc",
    "iproute2",
    "iputils-ping",
    "less",
    "vim-tiny",
    "sudo",
    "login",
    "util-linux",
    "strace",
)
# trixie's CRIU cannot dump inet sockets on kernels from 6.16 on, the next release's can. That
# release is not out: its Release file may be past its date.
CRIU_RECIPE = """
mirror=$(sed -En 's/^deb (\\[.*\\] )?([^ ]+) trixie main.*/\\2/p' /etc/apt/sources.list | head -n 1)
test -n "$mirror"
echo "deb [check-valid-until=no] $mirror forky main" >/etc/apt/sources.list.d/forky.list
printf 'Package: *\\nPin: release n=forky\\nPin-Priority: 100\\n' >/etc/apt/preferences.d/forky
apt-get -q update
apt-get -qy install --no-install-recommends -t forky criu python3-pycriu
apt-get clean
rm -rf /var/lib/apt/lists/*
"""
USERS_RECIPE = """
useradd --create-home --shell /bin/bash --uid 1001 alice
useradd --create-home --shell /bin/bash --uid 1002 bob
rm -f /etc/ssh/ssh_host_*_key* /etc/machine-id
"""
DEPENDENCIES_RECIPE = """
python3 -m venv --system-site-packages /opt/migrate
/opt/migrate/bin/pip install --no-index --find-links /run/wheels "$@"
"""
BUILDER_RECIPE = """
python3 -m venv /opt/build
/opt/build/bin/pip install --no-index --find-links /run/wheels "$@"
"""
# The wheel is built by the same hook that pip calls, and installed as the README says.
PRODUCT_RECIPE = """
cp -r /run/checkout /tmp/checkout
cd /tmp/checkout
/opt/build/bin/python -c 'import setuptools.build_meta as b; b.build_wheel("/tmp")'
/opt/migrate/bin/pip install --no-index --no-deps /tmp/*.whl
for program in migrate migctl migd loadavg rup evict joingroup showgroup migrategroup resetgroup; do
    ln -s /opt/migrate/bin/$program /usr/local/bin/$program
done
"""
SOURCES = (
    "pyproject.toml",
    "README.md",
    "migrate",
    "agent",
    "criu_hooks",
    "completion",
    "docs/migrate.1",
    "docs/joingroup.1",
    "docs/showgroup.1",
    "docs/migrategroup.1",
    "docs/resetgroup.1",
)


@dataclass(frozen=True)
class Image:
    """What every node is made of. `layers`: the topmost first."""

    layers: list[Path]

    @property
    def product(self) -> Path:
        """The layer that changes with the checkout; its name stands for the whole image."""
        return self.layers[0]


def build() -> Image:
    """The image of this checkout; the caller holds the cache's lock."""
    base = _base()
    dependencies = _dependencies(base)
    product = _product(base, dependencies)
    return Image([product, dependencies, base])


def _base() -> Path:
    recipe = CRIU_RECIPE + USERS_RECIPE

    def make(root: Path, scratch: Path) -> None:
        if shutil.which("mmdebstrap") is None:
            raise TestbedError("mmdebstrap is not installed", "run `make setup`")
        root.rmdir()
        options = ["--quiet", "--variant=apt", f"--include={','.join(PACKAGES)}"]
        run_outside(["mmdebstrap", *options, SUITE, str(root)])
        policy = root / "usr/sbin/policy-rc.d"  # no daemon is started while the image is made
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        binds = [("/etc/resolv.conf", "/etc/resolv.conf")]
        Sandbox(str(root), str(scratch), binds=binds).run(run_in_image(recipe))
        policy.unlink()
        (root / "etc/resolv.conf").unlink()

    key = layers.digest([SUITE, *PACKAGES, recipe, os.uname().machine])
    return layer("base", key, "building the Debian image (about a minute, once)", make)


def _dependencies(base: Path) -> Path:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["dependencies"]
    return _environment(base, "deps", DEPENDENCIES_RECIPE, wanted)


def _builder(base: Path) -> Path:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["build-system"]
    wanted: list[str] = project["requires"]
    return _environment(base, "builder", BUILDER_RECIPE, wanted)


def _environment(base: Path, kind: str, recipe: str, wanted: list[str]) -> Path:
    """A layer with a virtual environment that holds the distributions `wanted`."""

    def make(root: Path, scratch: Path) -> None:
        wheels = scratch / "wheels"
        _download(wheels, wanted, _python_version(base))
        sandbox = Sandbox(str(root), str(scratch), [str(base)], [(str(wheels), "/run/wheels")])
        sandbox.run(run_in_image(recipe, *wanted))

    key = layers.digest([base.name, recipe, *wanted])
    return layer(kind, key, f"installing {', '.join(wanted)} for the nodes' Python", make)


def _python_version(base: Path) -> str:
    """The nodes' Python: "3.13"."""
    return (base / "usr/bin/python3").readlink().name.removeprefix("python")


def _download(wheels: Path, wanted: list[str], python: str) -> None:
    """Fetch wheels with the machine's pip: in a bare image TLS has no roots to trust."""
    tools = cache_root() / "tools"
    if not (tools / "bin" / "pip").exists():
        run_outside([sys.executable, "-m", "venv", "--clear", str(tools)])
    machine = os.uname().machine
    command = [str(tools / "bin" / "pip"), "--quiet", "download", "--only-binary=:all:"]
    command += ["--python-version", python, "--dest", str(wheels)]
    for platform in ("manylinux_2_39", "manylinux_2_34", "manylinux_2_28", "manylinux2014"):
        command += ["--platform", f"{platform}_{machine}"]
    run_outside([*command, *wanted])


def _product(base: Path, dependencies: Path) -> Path:
    builder = _builder(base)

    def make(root: Path, scratch: Path) -> None:
        checkout = scratch / "checkout"
        checkout.mkdir()
        for name in SOURCES:
            (checkout / name).parent.mkdir(exist_ok=True)
            if (CHECKOUT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(CHECKOUT / name, checkout / name, ignore=ignored)
            elif (CHECKOUT / name).exists():
                shutil.copy(CHECKOUT / name, checkout / name)
            else:
                layers.say(f"the checkout has no {name}")
                (checkout / name).touch()
        lower = [str(builder), str(dependencies), str(base)]
        sandbox = Sandbox(str(root), str(scratch), lower, [(str(checkout), "/run/checkout")])
        sandbox.run(run_in_image(PRODUCT_RECIPE))

    key = layers.digest([dependencies.name, builder.name, PRODUCT_RECIPE, *_source_bytes()])
    return layer("product", key, "installing the product from this checkout", make)


def _source_bytes() -> list[str | bytes]:
    """The names and contents of all that a wheel is built from, in a fixed order."""
    parts: list[str | bytes] = []
    for name in SOURCES:
        top = CHECKOUT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                parts += [str(path.relative_to(CHECKOUT)), path.read_bytes()]
    return parts
