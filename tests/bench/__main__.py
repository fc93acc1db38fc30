"""`python tests/bench`: see cli.py."""

import sys
from pathlib import Path

# In place of this directory, which Python puts there.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.cli import main  # noqa: E402

main()
