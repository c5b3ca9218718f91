"""The DeepSpeed configuration: ours, the user's with its gaps filled, and what ES on shards cannot honour."""

import copy
import json
import sys

import pytest
import torch

from shardes.backends.deepspeed_config import make_deepspeed_config
from shardes.errors import UserError

SIZES = {
    "dtype": torch.float32,
    "micro_batch_size": 6,
    "world_size": 3,
    "hidden_size": 10,
    "largest_layer": 50,
    "largest_parameter": 30,
}
# What is gathered at a time, if the user does not say otherwise.
LIMITS = {
    "stage3_max_live_parameters": 70,
    "stage3_prefetch_bucket_size": 1,
    "stage3_allgather_sequential": True,
    "stage3_param_persistence_threshold": 10,
    "overlap_comm": False,
}


def made(tmp_path, tree, **sizes):
    """What comes of a user's file; checks on the way that the file is left alone."""
    path = tmp_path / "ds.json"
    text = tree if isinstance(tree, str) else json.dumps(tree)
    path.write_text(text)
    try:
        return make_deepspeed_config(path, **(SIZES | sizes))
    finally:
        assert path.read_text() == text


def refusal(tmp_path, tree, **sizes):
    with pytest.raises(UserError) as caught:
        made(tmp_path, tree, **sizes)
    message = str(caught.value)
    assert message.startswith(f"parallel.deepspeed: {tmp_path / 'ds.json'}")
    return message


def with_key(key, value):
    tree = {"zero_optimization": {"stage": 3}}
    *sections, last = key.split(".")
    target = tree
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    return tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_file_ours_is_complete(dtype):
    config = make_deepspeed_config(None, **(SIZES | {"dtype": dtype}))
    assert config == {
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, **LIMITS},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "train_micro_batch_size_per_gpu": 6,
        "steps_per_print": 10**9,
    }


def test_a_minimal_file_gives_the_same_as_none(tmp_path):
    assert made(tmp_path, {"zero_optimization": {"stage": 3}}) == make_deepspeed_config(None, **SIZES)


def test_autos_are_filled(tmp_path):
    tree = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    config = made(tmp_path, tree, dtype=torch.bfloat16)
    assert config == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "loss_scale": 0},
        "train_batch_size": 18,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 3,
            "memory_efficient_linear": False,
            "reduce_bucket_size": 100,
            "stage3_prefetch_bucket_size": 90,
            "stage3_param_persistence_threshold": 100,
            "stage3_max_live_parameters": 70,
            "stage3_allgather_sequential": True,
            "overlap_comm": False,
        },
        "steps_per_print": 10**9,
    }


def test_what_the_user_says_otherwise_is_passed_on(tmp_path):
    tree = {
        "steps_per_print": 5,
        "train_micro_batch_size_per_gpu": 6,
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True, "verbose": False},
        "zero_optimization": {
            "stage": 3,
            **dict.fromkeys(LIMITS, 123),
            "overlap_comm": False,
            "offload_param": {"device": "none"},
            "sub_group_size": 7,
        },
        "my_own": [1, {"deep": None}],
    }
    before = copy.deepcopy(tree)
    config = made(tmp_path, tree)
    assert config["zero_optimization"].pop("memory_efficient_linear") is False
    assert (config.pop("bf16"), config.pop("fp16")) == ({"enabled": False}, {"enabled": False})
    assert config == before


UNUSABLE = [
    ("optimizer", {"type": "AdamW"}, "ES has a step of its own: set es.alpha"),
    ("scheduler", {"type": "WarmupLR"}, "ES has a step of its own: set es.alpha_schedule"),
    ("zero_optimization.zero_hpz_partition_size", 2, "secondary copy"),
    ("zero_optimization.mics_shard_size", 2, "several copies of each shard"),
    ("zero_optimization.zero_quantized_weights", True, "quantised gathers"),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, "quantised gathers"),
    ("zero_optimization.offload_param", {"device": "cpu"}, "offloaded shards"),
    ("zero_optimization.offload_param", {"device": "nvme", "nvme_path": "/x"}, "offloaded shards"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, "no optimizer state"),
    ("zero_optimization.memory_efficient_linear", True, "replaces torch's linear"),
    ("compression_training", {"weight_quantization": {}}, "compressed weights"),
    ("quantize_training", {"enabled": True}, "quantised weights"),
    ("amp", {"enabled": True}, "model.dtype"),
    ("amp", {"opt_level": "O1"}, "model.dtype"),
    ("pipeline", {"stages": 2}, "ZeRO-3 only"),
    ("tensor_parallel", {"autotp_size": 2}, "ZeRO-3 only"),
    ("sequence_parallel_size", 2, "prompts are split over ranks"),
]


@pytest.mark.parametrize(("key", "value", "reason"), UNUSABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_an_unusable_key_is_refused_with_its_value_and_the_reason(tmp_path, key, value, reason):
    lines = refusal(tmp_path, with_key(key, value)).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(f"  {key} = {json.dumps(value)}: ")
    assert reason in lines[1]
    assert lines[1].endswith("; remove it")


def test_all_unusable_keys_are_listed_at_once(tmp_path):
    tree = with_key("optimizer", {"type": "Adam"})
    tree["zero_optimization"]["zero_quantized_weights"] = True
    assert len(refusal(tmp_path, tree).splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", {}),
        ("optimizer", None),
        ("zero_optimization.zero_hpz_partition_size", 1),
        ("zero_optimization.mics_shard_size", -1),
        ("zero_optimization.zero_quantized_weights", False),
        ("zero_optimization.offload_param", None),
        ("zero_optimization.offload_optimizer", {"device": "none"}),
        ("zero_optimization.memory_efficient_linear", False),
        ("amp", {"enabled": False}),
        ("sequence_parallel_size", 1),
    ],
)
def test_the_same_keys_are_accepted_when_they_ask_for_nothing(tmp_path, key, value):
    config = made(tmp_path, with_key(key, value))
    for part in key.split("."):
        config = config[part]
    assert config == value


@pytest.mark.parametrize(
    "zero", [{"stage": 2}, {"stage": 0}, {}, {"stage": "3"}, {"stage": None}, None], ids=str
)
def test_another_stage_is_refused(tmp_path, zero):
    tree = {} if zero is None else {"zero_optimization": zero}
    message = refusal(tmp_path, tree)
    assert f"zero_optimization.stage is {(zero or {}).get('stage')!r}; wanted 3" in message


@pytest.mark.parametrize(
    ("dtype", "key", "enabled"),
    [
        (torch.float32, "bf16", True),
        (torch.float16, "bf16", True),
        (torch.bfloat16, "bf16", False),
        (torch.bfloat16, "fp16", True),
        (torch.float16, "fp16", False),
    ],
    ids=str,
)
def test_a_contradictory_precision_is_refused(tmp_path, dtype, key, enabled):
    message = refusal(tmp_path, with_key(f"{key}.enabled", enabled), dtype=dtype)
    assert f"{key}.enabled is {json.dumps(enabled)}, which contradicts model.dtype" in message
    assert made(tmp_path, with_key(f"{key}.enabled", not enabled), dtype=dtype)[key] == {
        "enabled": not enabled
    }


@pytest.mark.parametrize(
    "key", ["zero_optimization.sub_group_size", "my.own.key", "steps_per_print", "optimizer"]
)
def test_an_auto_that_has_no_value_is_refused(tmp_path, key):
    message = refusal(tmp_path, with_key(key, "auto"))
    assert f'{key} is "auto", but shardes has no value for it' in message
    assert "train_batch_size" in message


@pytest.mark.parametrize("text", ["", "{", "{'stage': 3}", "not JSON"])
def test_a_file_that_is_not_json_is_refused(tmp_path, text):
    assert "is not JSON" in refusal(tmp_path, text)


@pytest.mark.parametrize("tree", [[], 3, None])
def test_a_file_that_is_no_object_is_refused(tmp_path, tree):
    assert "zero_optimization.stage is None; wanted 3" in refusal(tmp_path, tree)


@pytest.mark.parametrize(
    ("key", "value"), [("bf16", True), ("bf16", None), ("fp16", "auto"), ("zero_optimization", 3)]
)
def test_a_section_that_is_no_object_is_refused(tmp_path, key, value):
    assert key in refusal(tmp_path, {"zero_optimization": {"stage": 3}} | {key: value})


@pytest.mark.parametrize("train_batch_size", [8, 50])
def test_a_batch_size_that_deepspeed_would_refuse_is_refused_or_mended(tmp_path, train_batch_size):
    tree = {"zero_optimization": {"stage": 3}, "train_batch_size": train_batch_size}
    try:
        config = made(tmp_path, tree)
    except UserError as error:
        assert "train_batch_size" in str(error)
    else:
        per_step = config["train_micro_batch_size_per_gpu"] * SIZES["world_size"]
        assert config.get("train_batch_size", per_step) % per_step == 0


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"^parallel\.deepspeed: .* cannot be read"):
            make_deepspeed_config(path, **SIZES)
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(UserError, match="is not JSON"):
        make_deepspeed_config(tmp_path / "latin.json", **SIZES)


def test_deepspeed_itself_is_not_needed_to_check_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert made(tmp_path, {"zero_optimization": {"stage": 3}})["zero_optimization"]["stage"] == 3


def test_a_key_twice_is_refused(tmp_path):
    message = refusal(tmp_path, '{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 3}}')
    assert "is not JSON: the name 'zero_optimization' is given twice" in message
