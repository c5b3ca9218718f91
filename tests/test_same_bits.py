"""The same configuration gives the same bytes, however many ranks there are and whatever holds the shards."""

import itertools
import json

import pytest

from tests.helpers.exports import fingerprint
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import ROOT, free_port, run_ranks

BACKENDS, MODES, DTYPES = ("single", "zero3"), ("stream", "prompts"), ("float32", "bfloat16")


def run_cases(tmp_path, name, trees, world_size):
    """Trains and exports each tree on ``world_size`` ranks; returns fingerprints and run directories."""
    cases = [
        {"config": config, "export": str(tmp_path / f"{name}-export{i}"), "port": free_port()}
        for i, config in enumerate(trees)
    ]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "train_cases.py"
    run_ranks([script, path], world_size=world_size, log_dir=tmp_path / f"{name}-logs")
    return [fingerprint(tmp_path / f"{name}-export{i}") for i in range(len(cases))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_model(root / "tied", tied=True),
        "untied": tiny_model(root / "untied", tied=False, architecture="llama"),
    }


@pytest.fixture(scope="module")
def oracle(models, tmp_path_factory):
    """One process, one rank, plain tensors."""
    root = tmp_path_factory.mktemp("oracle")
    keys = list(itertools.product(models, DTYPES))
    trees = [
        tree(root, model=models[kind], run_dir=root / f"run-{kind}-{dtype}", model__dtype=dtype)
        for kind, dtype in keys
    ]
    prints = run_cases(root, "oracle", trees, 1)
    lines = {
        key: (root / f"run-{key[0]}-{key[1]}" / "metrics.jsonl").read_text().splitlines() for key in keys
    }
    return dict(zip(keys, prints, strict=True)), lines


def test_the_oracle_moves_every_weight_and_tells_members_apart(oracle, models):
    prints, lines = oracle
    assert len({json.dumps(p, sort_keys=True) for p in prints.values()}) == len(prints)
    for key in prints:
        stds = [json.loads(line)["reward_std"] for line in lines[key][:-1]]
        assert min(stds) > 0
        digests = [json.loads(line)["weights_digest"] for line in lines[key]]
        assert len(set(digests[:-1])) == len(digests) - 1


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_exports_are_byte_identical(world_size, models, oracle, tmp_path):
    prints, lines = oracle
    combinations = list(itertools.product(BACKENDS, MODES, DTYPES))
    # Untied, and another architecture, on the sharded backend only: it is the one that can go wrong.
    keys = [("tied", *c) for c in combinations] + [("untied", "zero3", mode, "float32") for mode in MODES]
    trees = [
        tree(
            tmp_path,
            model=models[kind],
            run_dir=tmp_path / f"run{i}",
            model__dtype=dtype,
            parallel__backend=backend,
            rollout__mode=mode,
        )
        for i, (kind, backend, mode, dtype) in enumerate(keys)
    ]
    found = run_cases(tmp_path, "cases", trees, world_size)
    for i, (kind, backend, mode, dtype) in enumerate(keys):
        assert found[i] == prints[kind, dtype], (kind, backend, mode, dtype)
        # Not only the weights: every reward on the way, too.
        measured = [
            json.loads(line) for line in (tmp_path / f"run{i}/metrics.jsonl").read_text().splitlines()
        ]
        for line, wanted in zip(measured, map(json.loads, lines[kind, dtype]), strict=True):
            for volatile in ("seconds", "peak_memory_bytes"):
                line.pop(volatile, None)
                wanted.pop(volatile, None)
            assert line == wanted
