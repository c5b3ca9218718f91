"""Starting the checks of ``backend_checks.py`` on several ranks."""

import json

from tests.helpers.models import tree
from tests.helpers.ranks import ROOT, run_ranks


def backend_case(tmp_path, *, model, checks=(), **changes):
    """One case: a configuration, and the names of further checks."""
    mode = {"rollout__gather": "layer"}
    return {
        "config": tree(tmp_path, model=model, run_dir=tmp_path / "run", **(mode | changes)),
        "checks": list(checks),
    }


def check_backends(tmp_path, cases, *, world_size):
    """Runs the cases one after the other in one set of ranks; returns what they printed."""
    path = tmp_path / f"cases{world_size}.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "backend_checks.py"
    return run_ranks([script, path], world_size=world_size, log_dir=tmp_path / f"logs{world_size}")
