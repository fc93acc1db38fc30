# One command each. On a fresh Debian 12 or 13, as root.
PYTHON ?= python3
# mmdebstrap needs gpg (which keys sign the release) and mount; python3-venv brings pip.
PACKAGES = git gpg iproute2 mmdebstrap mount openssh-client python3 python3-venv
VENV = .venv/bin
NODES = tests/testbed/nodes

.PHONY: setup packages test demo lint bench down

# What the testbed, the tests and the linters need.
setup: packages .venv/installed

# What the testbed needs.
packages:
	@test "$$(dpkg-query -Wf '$${db:Status-Status}\n' $(PACKAGES) 2>&1 | sort -u)" = installed || \
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
demo: packages
	@tests/testbed/demo

lint: setup
	$(VENV)/python -m pytest tests/unit/test_lint.py

bench: setup
	$(VENV)/python tests/bench

# Stop and remove the nodes.
down:
	$(NODES) down
