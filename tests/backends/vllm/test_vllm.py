"""Shards in vLLM's own parameters have the bits of plain tensors."""

import json

import pytest

from tests.helpers.models import tree
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.vllm_models import ARCHITECTURES, REPACKED, vllm_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def model_paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: vllm_model(root / name, architecture=name) for name in ARCHITECTURES}


def check(tmp_path, models, world_size):
    """Compares on every rank, see vllm_checks.py; ``models`` are directories with dtypes."""
    cases = [
        {
            "config": tree(
                tmp_path,
                model=path,
                run_dir=tmp_path / "run",
                parallel__backend="vllm",
                model__dtype=dtype,
                rollout__kv_cache_gib=0.05,
            ),
            "is_repacked": path.name in REPACKED,
        }
        for path, dtype in models
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "vllm_checks.py"
    run_ranks([script, path], world_size=world_size, log_dir=tmp_path / "logs")


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_are_where_vllm_loads_them_and_have_the_bits_of_plain_tensors(
    tmp_path, model_paths, world_size
):
    # What bfloat16 rounds is the same everywhere.
    narrow = [(model_paths[name], "bfloat16") for name in ("qwen2", "phi3")]
    check(tmp_path, [*((path, "float32") for path in model_paths.values()), *narrow], world_size)


@pytest.mark.exhaustive
def test_three_ranks_share_what_three_divides(tmp_path):
    """Three heads, one of keys and values for all, and a vocabulary whose padding the last rank has."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96, "intermediate_size": 201}
    path = vllm_model(tmp_path / "model", architecture="llama", vocab_size=190, **sizes)
    check(tmp_path, [(path, "float32"), (path, "bfloat16")], 3)
