"""The same configuration gives the same bytes, however many ranks there are and whatever holds the shards."""

import itertools
import json

import pytest

from tests.helpers.exports import fingerprint
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import run_cases, steady_metrics

DTYPES = ("float32", "bfloat16")
# Model, backend, mode, dtype, parts of the weights. The other modes and meshes are test_mesh's.
CASES = [
    ("tied", "single", "member", "float32", 1),
    ("tied", "zero3", "layer", "float32", 1),
    ("tied", "fsdp", "member", "bfloat16", 1),
    ("tied", "fsdp", "layer", "float32", 1),
    ("tied", "zero3", "member", "bfloat16", 1),
    # Another architecture, and a head of its own.
    ("untied", "zero3", "member", "float32", 1),
    ("untied", "fsdp", "layer", "bfloat16", 1),
    ("tied", "zero3", "iteration", "float32", 3),
    ("tied", "fsdp", "member", "float32", 3),
]


@pytest.fixture(scope="module")
def oracle(model_dirs, tmp_path_factory):
    """One process, one rank, plain tensors."""
    root = tmp_path_factory.mktemp("oracle")
    keys = [*itertools.product(("tied", "untied"), DTYPES, (1,)), ("tied", "float32", 3)]
    trees = [
        tree(
            root,
            model=model_dirs[kind],
            run_dir=root / f"run-{kind}-{dtype}-{parts}",
            model__dtype=dtype,
            es__subspaces=parts,
        )
        for kind, dtype, parts in keys
    ]
    prints = run_cases(root, "oracle", trees, 1)
    lines = {key: steady_metrics(root / f"run-{key[0]}-{key[1]}-{key[2]}") for key in keys}
    return dict(zip(keys, prints, strict=True)), lines


def test_the_oracle_moves_every_weight_and_tells_members_apart(oracle):
    prints, lines = oracle
    assert len({json.dumps(p, sort_keys=True) for p in prints.values()}) == len(prints)
    for key in prints:
        stds = [line["reward_std"] for line in lines[key][:-1]]
        assert min(stds) > 0
        digests = [line["weights_digest"] for line in lines[key]]
        assert len(set(digests[:-1])) == len(digests) - 1


@pytest.mark.slow
@pytest.mark.parametrize(  # one rank is test_backends'
    "world_size",
    [pytest.param(2, marks=pytest.mark.exhaustive), 3, pytest.param(4, marks=pytest.mark.exhaustive)],
)
def test_exports_are_byte_identical(world_size, model_dirs, oracle, tmp_path):
    prints, lines = oracle
    # All on a number of ranks that divides nothing; on the others what the meshes' tests leave out.
    cases = CASES if world_size == 3 else CASES[1:3]
    trees = [
        tree(
            tmp_path,
            model=model_dirs[kind],
            run_dir=tmp_path / f"run{i}",
            model__dtype=dtype,
            parallel__backend=backend,
            rollout__gather=mode,
            es__subspaces=parts,
        )
        for i, (kind, backend, mode, dtype, parts) in enumerate(cases)
    ]
    found = run_cases(tmp_path, "cases", trees, world_size)
    for i, (kind, backend, mode, dtype, parts) in enumerate(cases):
        assert found[i] == prints[kind, dtype, parts], (kind, backend, mode, dtype, parts)
        # Not only the weights: every reward on the way, too.
        assert steady_metrics(tmp_path / f"run{i}") == lines[kind, dtype, parts]


@pytest.mark.slow
def test_a_journal_replayed_in_tensor_parallel_shards_gives_the_same_bytes(tmp_path):
    """Forwards sum in another order there, but the same rewards must give the same weights."""
    model = tiny_model(tmp_path / "model", tied=True, num_heads=12, num_kv_heads=12)
    run_dir = tmp_path / "run"
    wanted = run_cases(tmp_path, "alone", [tree(tmp_path, model=model, run_dir=run_dir)], 1)
    for backend, world_size in (("tensor_parallel", 2), ("tensor_parallel", 3), ("fsdp", 3)):
        out = tmp_path / f"{backend}{world_size}"
        arguments = ["-m", "shardes", "export", run_dir, out, "--backend", backend]
        run_ranks(arguments, world_size=world_size, log_dir=tmp_path / f"{out.name}-logs")
        assert [fingerprint(out)] == wanted, (backend, world_size)
