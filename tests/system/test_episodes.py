"""Episodes of many turns: the same bytes, however many ranks there are and whatever holds the shards."""

import json

import pytest

from tests.helpers.models import tree
from tests.helpers.runs import run_cases, steady_metrics

GAME = "tests.helpers.games:Count"
CASES = [
    ("zero3", "layer", {}),
    ("zero3", "member", {}),
    ("zero3", "iteration", {}),
    ("fsdp", "layer", {}),
    ("fsdp", "member", {}),
    ("zero3", "layer", {"rollout__temperature": 1.0, "rollout__samples_per_prompt": 2}),
]


def episodes(root, *, model, run_dir, **keys):
    settings = {
        "task__environment": GAME,
        "task__reward": None,
        "task__data": "range:0:7",
        "task__heldout_data": "range:7:10",
        "task__batch_size": None,
        "task__max_turns": 3,
        "rollout__micro_batch_size": 2,
        "rollout__max_context": 15,
        **keys,
    }
    return tree(root, model=model, run_dir=run_dir, **settings)


@pytest.fixture(scope="module")
def oracle(model_dirs, tmp_path_factory):
    """One process, one rank, plain tensors: greedy, and sampled."""
    root = tmp_path_factory.mktemp("oracle")
    trees = [
        episodes(root, model=model_dirs["tied"], run_dir=root / name, **keys)
        for name, keys in (("greedy", {}), ("sampled", CASES[-1][-1]))
    ]
    prints = run_cases(root, "oracle", trees, 1)
    return dict(zip(("greedy", "sampled"), prints, strict=True)), {
        name: steady_metrics(root / name) for name in ("greedy", "sampled")
    }


def test_the_oracle_plays_whole_episodes_and_tells_members_apart(oracle):
    prints, lines = oracle
    assert prints["greedy"] != prints["sampled"]
    for line in lines["greedy"][:-1]:
        assert line["reward_std"] > 0
        assert 2 <= line["components"]["turns"] <= 3
    assert any(line["components"]["context_full"] > 0 for line in lines["greedy"][:-1])
    assert any(line["components"]["ones"] > 0 for line in lines["greedy"][:-1])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_episodes_are_played_alike_on_any_ranks(world_size, model_dirs, oracle, tmp_path):
    prints, lines = oracle
    trees = [
        episodes(
            tmp_path,
            model=model_dirs["tied"],
            run_dir=tmp_path / f"run{i}",
            parallel__backend=backend,
            rollout__gather=gather,
            **keys,
        )
        for i, (backend, gather, keys) in enumerate(CASES)
    ]
    found = run_cases(tmp_path, "cases", trees, world_size)
    for i, (backend, gather, keys) in enumerate(CASES):
        name = "sampled" if keys else "greedy"
        assert found[i] == prints[name], (backend, gather, keys)
        assert steady_metrics(tmp_path / f"run{i}") == lines[name]
        line = json.loads((tmp_path / f"run{i}" / "metrics.jsonl").read_text().splitlines()[0])
        assert line["num_environment_kills"] == 0
