"""ZeRO-3 shards give the logits of plain tensors, whatever DeepSpeed keeps gathered."""

import json
import re
from unittest import mock

import pytest

from shardes.backends.zero3 import _check_alike
from tests.helpers.backend_cases import backend_case, check_backends
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

pytest.importorskip("deepspeed")


def check(tmp_path, *, world_size, dtype="float32", zero=None, tied=True):
    changes = {"parallel__backend": "zero3", "model__dtype": dtype}
    if zero is not None:
        changes["parallel__deepspeed"] = deepspeed = tmp_path / "deepspeed.json"
        deepspeed.write_text(
            json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, **zero}})
        )
    model = tiny_model(tmp_path / "model", tied=tied)
    case = backend_case(tmp_path, model=model, **changes)
    return check_backends(tmp_path, [case], world_size=world_size)


@pytest.mark.slow
def test_no_gathered_copy_goes_stale(tmp_path):
    # DeepSpeed's own limits: some parameters stay gathered for good, the others while they are prefetched.
    zero = {
        "stage3_param_persistence_threshold": 100,
        "stage3_max_live_parameters": 10**9,
        "stage3_prefetch_bucket_size": 5 * 10**7,
    }
    output = check(tmp_path, world_size=3, zero=zero)
    # Three ranks do not divide every parameter, so there is padding to leave alone.
    assert all(int(n) > 0 for n in re.findall(r"padding (\d+) checked", output)[-1:])


def test_ranks_that_gather_different_parameters_are_stopped():
    group = mock.Mock(gather_json=lambda ints: [ints, [3, 1]])
    _check_alike(group, [3, 1])
    with pytest.raises(RuntimeError, match="different orders"):
        _check_alike(group, [1, 3])


@pytest.mark.slow
def test_prefetching_as_little_as_possible_changes_nothing(tmp_path):
    zero = {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    check(tmp_path, world_size=2, zero=zero, tied=False)


@pytest.mark.slow
def test_float16_is_refused_where_deepspeed_has_none(tmp_path, monkeypatch):
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    monkeypatch.setattr(type(accelerator), "is_fp16_supported", lambda self: False)
    model = tiny_model(tmp_path / "model", tied=True)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tree(tmp_path, model=model, run_dir=tmp_path / "run")))
    result = call("train", "--config", config, "parallel.backend=zero3", "model.dtype=float16")
    assert result.returncode == 2
    assert "model.dtype: deepspeed has no float16" in result.stderr
    assert "Traceback" not in result.stderr


def has_float16():
    import deepspeed

    return deepspeed.get_accelerator().is_fp16_supported()


@pytest.mark.slow
@pytest.mark.skipif("not has_float16()", reason="DeepSpeed has no float16 on this device")
def test_float16_is_as_exact_as_the_others(tmp_path):
    check(tmp_path, world_size=2, dtype="float16")
