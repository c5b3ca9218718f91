"""Whole runs on several ranks, compared by exported bytes and by what metrics.jsonl says."""

import json

from tests.helpers.exports import fingerprint
from tests.helpers.ranks import ROOT, run_ranks

# What depends on the clock, or on how members are evaluated.
VOLATILE = (
    *("seconds", "gather", "peak_memory_bytes", "environment_seconds", "num_prefilled_tokens"),
    *("num_reencoded", "num_environment_kills"),
)


def journal_of(run_dir):
    """The records of a run's journal."""
    return [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]


def steady_metrics(run_dir):
    """The lines of a run's metrics that every way to run it must share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def gathers_of(run_dir):
    """The mode of each iteration."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["gather"] for line in lines if "gather" in line]


def run_cases(root, name, trees, world_size, shortages=None):
    """Trains and exports each tree on ``world_size`` ranks; returns fingerprints.

    ``shortages`` says, by the index of a tree, where memory runs out (see train_cases.py).
    """
    cases = [
        {
            "config": config,
            "export": str(root / f"{name}-export{i}"),
            "shortages": (shortages or {}).get(i, []),
        }
        for i, config in enumerate(trees)
    ]
    path = root / f"{name}.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "train_cases.py"
    run_ranks([script, path], world_size=world_size, log_dir=root / f"{name}-logs")
    return [fingerprint(root / f"{name}-export{i}") for i in range(len(cases))]
