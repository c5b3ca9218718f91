"""A real model gives the same bytes in one process, under zero3, and under fsdp whatever is killed.

Needs models/smollm2-135m-instruct (``python tools/get_smollm2.py``), or another place of it in
``SMOLLM2_DIR``, and some minutes on two cores:

    python -m pytest -m exhaustive tests/system/test_real_model.py
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.ranks import ROOT, Ranks
from tests.helpers.runs import journal_of, steady_metrics

MODEL = Path(os.environ.get("SMOLLM2_DIR", ROOT / "models" / "smollm2-135m-instruct"))
LAUNCH = ROOT / "launch" / "train.py"
POPULATION, ITERATIONS, SECONDS = 4, 2, 900


def write_config(path, *, run_dir, backend):
    """The receipts of configs/own_task, few and with short answers, judged so that members differ."""
    receipts = (ROOT / "configs" / "own_task" / "problems.jsonl").read_text().splitlines()
    problems = path.with_suffix(".jsonl")
    problems.write_text("\n".join(receipts[:4]) + "\n")
    tree = {
        "model": {"path": str(MODEL), "dtype": "bfloat16"},
        "run": {"dir": str(run_dir), "snapshot_every": 1},
        "parallel": {"backend": backend, "threads_per_rank": 1, "timeout_seconds": 600},
        "rollout": {"max_new_tokens": 8, "micro_batch_size": 4},
        "es": {"iterations": ITERATIONS, "population": POPULATION, "sigma": 1e-3},
        "task": {
            "data": str(problems),
            "columns": {"prompt": "receipt"},
            "system": 'Answer with a JSON object {"total": NUMBER} and nothing else.',
            "reward": f"{ROOT / 'tests' / 'helpers' / 'rewards.py'}:spread_of_chats",
            "reward_workers": 0,
        },
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def members_of(run_dir):
    """How many members the journal has, of all iterations."""
    if not (run_dir / "journal.jsonl").exists():
        return 0
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return sum('"type":"member"' in line.replace(" ", "") for line in lines)


def train(tmp_path, backend, *, world_size, kill_after=()):
    """Run to the end; all ranks are killed whenever the journal has so many members more."""
    run_dir = tmp_path / backend
    config = write_config(tmp_path / f"{backend}.yaml", run_dir=run_dir, backend=backend)
    for attempt, num_members in enumerate([*kill_after, None]):
        logs = tmp_path / f"logs-{backend}-{attempt}"
        with Ranks([LAUNCH, "--config", config], world_size=world_size, log_dir=logs) as ranks:
            if num_members is None:
                assert ranks.wait(SECONDS) == [0] * world_size, ranks.output()
                continue
            deadline = time.monotonic() + SECONDS
            while members_of(run_dir) < num_members:
                assert time.monotonic() < deadline, ranks.output()
                assert ranks.processes[0].poll() is None, ranks.output()
                time.sleep(0.02)
            for rank in ranks.processes:
                rank.send_signal(signal.SIGKILL)
            assert -signal.SIGKILL in ranks.wait(60), ranks.output()
    out = tmp_path / f"export-{backend}"
    result = call("shardes", "export", run_dir, out)
    assert result.returncode == 0, result.stderr
    return run_dir, fingerprint(out)


def digests_of(run_dir):
    """The digest of the weights after each iteration; records that were written twice say the same."""
    found = {}
    for record in journal_of(run_dir):
        if record.get("type") == "weights":
            assert found.setdefault(record["iteration"], record["digest"]) == record["digest"]
    return [found[iteration] for iteration in sorted(found)]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(5 * SECONDS)
@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="python tools/get_smollm2.py makes it")
def test_smollm2_gives_the_same_bytes_in_every_backend_and_after_kills(tmp_path, capsys):
    pytest.importorskip("deepspeed")
    alone, whole = train(tmp_path, "single", world_size=1)
    sharded, of_zero3 = train(tmp_path, "zero3", world_size=2)
    # In the middle of the first iteration, and of the second.
    killed, of_fsdp = train(tmp_path, "fsdp", world_size=2, kill_after=(2, POPULATION + 2))
    with capsys.disabled():
        sys.stdout.write(json.dumps({"digests": digests_of(alone), "files": whole}, indent=1) + "\n")
    assert len(set(digests_of(alone))) == ITERATIONS  # each iteration moved the weights
    assert digests_of(alone) == digests_of(sharded) == digests_of(killed)
    assert whole == of_zero3 == of_fsdp
    lines = [
        [
            {k: line.get(k) for k in ("reward_mean", "reward_std", "num_tokens")}
            for line in steady_metrics(run_dir)
        ]
        for run_dir in (alone, sharded, killed)
    ]
    assert lines[0] == lines[1] == lines[2]
