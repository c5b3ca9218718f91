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


@pytest.mark.parametrize("world_size", [1, 2])
def test_shards_are_where_vllm_loads_them_and_have_the_bits_of_plain_tensors(
    tmp_path, model_paths, world_size
):
    kinds = [(name, dtype) for name in ARCHITECTURES for dtype in ("float32", "bfloat16")]
    # Experts are refused for the same reason in both, and what bfloat16 rounds is the same everywhere.
    kinds = [(name, dtype) for name, dtype in kinds if dtype == "float32" or name in ("qwen2", "phi3")]
    cases = [
        {
            "config": tree(
                tmp_path,
                model=model_paths[name],
                run_dir=tmp_path / "run",
                parallel__backend="vllm",
                model__dtype=dtype,
                rollout__kv_cache_gib=0.05,
            ),
            "is_repacked": name in REPACKED,
        }
        for name, dtype in kinds
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "vllm_checks.py"
    output = run_ranks([script, path], world_size=world_size, log_dir=tmp_path / "logs")
    assert output.count("padding") == 0
