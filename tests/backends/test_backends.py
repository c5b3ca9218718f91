"""Every backend, for every architecture, holds and computes what plain tensors in one process do.

What is compared is in ``helpers/backend_checks.py``.
"""

import functools
import json

import pytest

from tests.helpers.backend_cases import backend_case, check_backends
from tests.helpers.models import ARCHITECTURES, tiny_model

pytest.importorskip("deepspeed")

SHARDING = ("zero3", "fsdp")
# DeepSpeed told to hold no more than it must.
TIGHT = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": 1,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Makes each model once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(architecture, *, tied, **sizes):
        name = "-".join(map(str, [architecture, tied, *sizes.values()]))
        return tiny_model(root / name, tied=tied, architecture=architecture, **sizes)

    return make


def few_cases(tmp_path, model, world_size):
    """Two architectures, tied and untied, and both dtypes, in every backend."""
    heads = {"num_heads": world_size, "num_kv_heads": world_size}
    cases = [
        backend_case(
            tmp_path,
            model=model(architecture, tied=tied),
            checks=["episodes"],
            parallel__backend=backend,
            model__dtype=dtype,
        )
        for backend in SHARDING
        for architecture, tied, dtype in (("qwen2", True, "float32"), ("llama", False, "bfloat16"))
    ]
    cases += [
        backend_case(
            tmp_path,
            model=model(architecture, tied=tied, **heads),
            checks=["decoding", "episodes"],
            parallel__backend="tensor_parallel",
            model__dtype=dtype,
        )
        for architecture, tied, dtype in (("qwen2", True, "float32"), ("llama", False, "bfloat16"))
    ]
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_backends_are_plain_tensors_spread_out(world_size, model, tmp_path):
    check_backends(tmp_path, few_cases(tmp_path, model, world_size), world_size=world_size)


@pytest.mark.slow
def test_all_architectures_are_plain_tensors_spread_out(model, tmp_path):
    """Three ranks divide no size of these models but what tensor parallelism has to have divided."""
    heads = {"num_heads": 3, "num_kv_heads": 3}
    cases = []
    for number, architecture in enumerate(ARCHITECTURES):
        tied = bool(number % 2)
        cases += [
            backend_case(tmp_path, model=model(architecture, tied=tied), parallel__backend=backend)
            for backend in SHARDING
        ]
        spread = model(architecture, tied=not tied, **heads)
        cases.append(backend_case(tmp_path, model=spread, parallel__backend="tensor_parallel"))
    check_backends(tmp_path, cases, world_size=3)


@pytest.mark.slow
def test_backends_work_in_a_part_of_the_job(model, tmp_path):
    sizes = {"num_heads": 2, "num_kv_heads": 2}
    cases = [
        backend_case(
            tmp_path,
            model=model("qwen2", tied=True, **sizes),
            parallel__backend=backend,
            parallel__shard_size=2,
        )
        for backend in (*SHARDING, "tensor_parallel")
    ]
    check_backends(tmp_path, cases, world_size=4)


@pytest.mark.slow
def test_streaming_gathers_once_and_holds_two_layers_at_most(model, tmp_path):
    deepspeed = tmp_path / "tight.json"
    deepspeed.write_text(json.dumps(TIGHT))
    cases = []
    # A tied weight is needed at both ends and stays; tied models are those whose embedding is large.
    for tied, vocab_size in ((True, 1009), (False, 211)):
        path = model("qwen2", tied=tied, vocab_size=vocab_size)
        cases += [
            backend_case(tmp_path, model=path, checks=["memory", "traffic"], parallel__backend="fsdp"),
            backend_case(tmp_path, model=path, checks=["memory", "traffic"], parallel__backend="zero3"),
            # Held so tightly, a tied weight is gathered twice.
            backend_case(
                tmp_path,
                model=path,
                checks=["memory"] if tied else ["memory", "traffic"],
                parallel__backend="zero3",
                parallel__deepspeed=deepspeed,
            ),
        ]
    check_backends(tmp_path, cases, world_size=3)
