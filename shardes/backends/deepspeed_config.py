"""The DeepSpeed configuration: the default one, or the user's with its ``auto`` values filled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shardes.errors import UserError
from shardes.utils.reading import parse_json, read_regular

_MOST_BYTES = 1 << 24


def _enabled(value: Any) -> bool:
    return value.get("enabled", True) is not False if isinstance(value, dict) else bool(value)


def _offloads(value: Any) -> bool:
    return isinstance(value, dict) and value.get("device", "none") not in ("none", None)


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


_QUANTISED = "quantised gathers round away the noise that ES adds"
# Keys that are refused, each with the function that is true of the values meant, and the reason.
_UNUSABLE: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("optimizer", bool, "ES has a step of its own: set es.alpha and es.alpha_schedule instead"),
    ("scheduler", bool, "ES has a step of its own: set es.alpha_schedule instead"),
    (
        "zero_optimization.zero_hpz_partition_size",
        _above_one,
        "hpZ forwards read a secondary copy of the weights that perturbations do not reach",
    ),
    (
        "zero_optimization.mics_shard_size",
        _above_one,
        "MiCS keeps several copies of each shard, and perturbations would reach only one",
    ),
    ("zero_optimization.zero_quantized_weights", bool, _QUANTISED),
    ("zero_optimization.zero_quantized_nontrainable_weights", bool, _QUANTISED),
    ("zero_optimization.offload_param", _offloads, "offloaded shards were not tried with shardes"),
    ("zero_optimization.offload_optimizer", _offloads, "there is no optimizer state to offload"),
    (
        "zero_optimization.memory_efficient_linear",
        bool,
        "it replaces torch's linear function for the whole process",
    ),
    ("compression_training", bool, "compressed weights cannot be perturbed exactly"),
    ("quantize_training", bool, "quantised weights cannot be perturbed exactly"),
    ("amp", _enabled, "the dtype of the weights is model.dtype"),
    ("pipeline", bool, "the model is sharded by ZeRO-3 only"),
    ("tensor_parallel", bool, "the model is sharded by ZeRO-3 only"),
    ("sequence_parallel_size", _above_one, "prompts are split over ranks, not sequences"),
)


def make_deepspeed_config(
    path: Path | None,
    *,
    dtype: torch.dtype,
    micro_batch_size: int | None,
    world_size: int,
    hidden_size: int,
    largest_layer: int,
    largest_parameter: int,
) -> dict[str, Any]:
    """Make a complete configuration for ``deepspeed.initialize``.

    Args:
        path: JSON file of the user; None for the default configuration.
        dtype: Dtype of the model.
        micro_batch_size: Prompts per forward; None if that is not known yet. Any number will do then, since
            DeepSpeed only trains with it.
        world_size: Number of ranks.
        hidden_size: Width of the model, on which ``auto`` bucket sizes depend.
        largest_layer: Elements of the largest layer. At most twice as many are gathered at a time, unless
            the file has another limit.
        largest_parameter: Elements of the largest parameter that is fetched ahead.

    Raises:
        UserError: The file cannot be read, or has a value that cannot be used.
    """
    tree: dict[str, Any] = {"zero_optimization": {"stage": 3}} if path is None else _read(path)
    if path is not None:
        _refuse_unusable(tree, path)
    per_rank = 1 if micro_batch_size is None else micro_batch_size
    batch = {
        "train_micro_batch_size_per_gpu": per_rank,
        "train_batch_size": per_rank * world_size,
        "gradient_accumulation_steps": 1,
    }
    tree["zero_optimization"]["memory_efficient_linear"] = False
    for key, wanted in (("bf16", dtype == torch.bfloat16), ("fp16", dtype == torch.float16)):
        _check_precision(tree, key, wanted, path)
    autos = {
        **batch,
        "gradient_clipping": 0.0,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    _fill_autos(tree, autos, path)
    for key, value in batch.items():
        if micro_batch_size is not None and tree.get(key, value) != value:
            raise UserError(
                f"parallel.deepspeed: {path}: {key} is {json.dumps(tree[key])}, but rollout.micro_batch_size "
                f'and the number of ranks make it {value}; set it to "auto" or remove it'
            )
    # DeepSpeed's own limits are absolute numbers, which hold whole models of a billion parameters. It fetches
    # until its limit is reached, so that the last parameter comes on top.
    defaults = {
        "stage3_max_live_parameters": 2 * largest_layer - largest_parameter,
        # Whenever a module is called, the next parameter is fetched ahead, soon several. What is fetched
        # in one go could be held until the last of it was used, ...
        "stage3_prefetch_bucket_size": 1,
        # ... and would be copied out of a buffer as large as all of it.
        "stage3_allgather_sequential": True,
        "stage3_param_persistence_threshold": hidden_size,
        # Gathers then begin after what is queued on the stream that shards are written on. NCCL still
        # transfers while layers compute.
        "overlap_comm": False,
    }
    for key, value in defaults.items():
        tree["zero_optimization"].setdefault(key, value)
    tree.setdefault("train_micro_batch_size_per_gpu", per_rank)
    tree.setdefault("steps_per_print", 10**9)
    return tree


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_json(read_regular(path, max_bytes=_MOST_BYTES), refuse_repeats=True)
    except OSError as error:
        raise UserError(f"parallel.deepspeed: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed: {path} is not JSON: {error}") from None
    for key in ("zero_optimization", "bf16", "fp16"):
        if isinstance(tree, dict) and not isinstance(tree.get(key, {}), dict):
            raise UserError(
                f"parallel.deepspeed: {path}: {key} is {json.dumps(tree[key])}; wanted an object of keys"
            )
    stage = tree.get("zero_optimization", {}).get("stage") if isinstance(tree, dict) else None
    if stage != 3:
        raise UserError(
            f"parallel.deepspeed: {path}: zero_optimization.stage is {stage!r}; wanted 3. Lower stages do "
            "not shard parameters: use stage 3, or parallel.backend: single"
        )
    return tree


def _refuse_unusable(tree: dict[str, Any], path: Path) -> None:
    problems = []
    for key, is_set, reason in _UNUSABLE:
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and value != "auto" and is_set(value):
            problems.append(f"  {key} = {json.dumps(value)}: {reason}; remove it")
    if problems:
        raise UserError("\n".join([f"parallel.deepspeed: {path} has keys that cannot be used:", *problems]))


def _check_precision(tree: dict[str, Any], key: str, wanted: bool, path: Path | None) -> None:
    section = tree.setdefault(key, {})
    given = section.get("enabled", "auto")
    if given != "auto" and bool(given) != wanted:
        raise UserError(
            f"parallel.deepspeed: {path}: {key}.enabled is {json.dumps(given)}, which contradicts "
            f'model.dtype; set it to "auto"'
        )
    section["enabled"] = wanted


def _fill_autos(tree: dict[str, Any], autos: dict[str, Any], path: Path | None, prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _fill_autos(value, autos, path, f"{prefix}{key}.")
        elif value == "auto":
            if prefix + key not in autos:
                raise UserError(
                    f'parallel.deepspeed: {path}: {prefix}{key} is "auto", but shardes has no value for it; '
                    "give a number or remove it. Filled are: bf16.enabled, fp16.enabled, "
                    f"{', '.join(sorted(autos))}"
                )
            tree[key] = autos[prefix + key]
