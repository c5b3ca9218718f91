"""Comparing whole runs: exported bytes, and what metrics.jsonl says."""

import json

# What depends on the clock, or on how members are evaluated.
VOLATILE = ("seconds", "rollout_mode", "peak_memory_bytes")


def steady_metrics(run_dir):
    """The lines of a run's metrics that every way to run it must share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in lines]


def rollout_modes(run_dir):
    """The mode of each iteration."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["rollout_mode"] for line in lines if "rollout_mode" in line]
