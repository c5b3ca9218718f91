"""The command: ``python tools/claims run|table|grpo``."""

import sys
from pathlib import Path

# Not this directory itself, whose modules are those of a package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from claims.cli import main  # noqa: E402

main()
