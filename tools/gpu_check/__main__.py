"""Run the checks, or one part of them: python tools/gpu_check --help."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), str(root / "tools"), str(root / "tools" / "bench")]
    # For this process, and for those that it starts.
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])

    from gpu_check.cli import main

    sys.exit(main())
