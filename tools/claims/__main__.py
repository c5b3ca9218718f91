"""The command: ``python tools/claims run|table|grpo``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims.cli import main

main()
