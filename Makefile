# One command each. On a fresh Debian 12 or 13, as root.
PYTHON ?= python3
PACKAGES = git iproute2 mmdebstrap openssh-client python3 python3-venv
VENV = .venv/bin
NODES = tests/testbed/nodes

.PHONY: setup test demo lint bench down

# What the testbed, the tests and the linters need.
setup: packages .venv/installed

.PHONY: packages
packages:
	@dpkg-query --show $(PACKAGES) >/dev/null 2>&1 || \
	  { apt-get -q update && DEBIAN_FRONTEND=noninteractive \
	    apt-get -qy install --no-install-recommends $(PACKAGES); }

.venv/installed: pyproject.toml | packages
	$(PYTHON) -m venv --clear .venv
	$(VENV)/pip --quiet --disable-pip-version-check install --editable '.[test]'
	touch $@

# All tests: without privileges in tests/unit, on three nodes in tests/integration.
test: setup
	$(VENV)/python -m pytest

# Move a program through three nodes and home again, before one's eyes. Leaves the nodes up.
demo: setup
	tests/testbed/demo

lint: setup
	$(VENV)/ruff check .
	$(VENV)/mypy
	MYPYPATH=tests $(VENV)/mypy --strict -p testbed

bench: setup
	$(VENV)/python tests/bench

# Stop and remove the nodes.
down:
	$(NODES) down
