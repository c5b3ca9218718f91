"""Replay journals in this process, on the device that it sees: NAME=RUN_DIR ..."""

import json
import sys
from pathlib import Path


def verify(run_dirs: dict[str, Path]) -> dict[str, str]:
    """Replay journals over their base models, on this process's device, in plain tensors.

    Returns:
        The problems by name, an empty text if there are none.
    """
    from shardes.monitor.verify import verify_run
    from shardes.runs.directory import read_run
    from shardes.session import open_session

    found = {}
    for name, path in run_dirs.items():
        config, header, history = read_run(path, base=None, backend="single")
        with open_session(config) as session:
            session.follow(header, path)
            result = verify_run(session, history, run_dir=path, export=None)
        problems = list(result.problems)
        if result.num_iterations == 0 or result.num_compared < 2:
            problems.append(f"nothing was compared: {result}")
        found[name] = "; ".join(problems)
    return found


if __name__ == "__main__":
    pairs = [word.partition("=") for word in sys.argv[1:]]
    print(json.dumps(verify({name: Path(path) for name, _, path in pairs})))
