"""How much memory there is, how much generating takes, and whether it was too little."""

import os
from pathlib import Path
from typing import Any

import torch

# What allocators that are not CUDA's own say: those of CPUs, and of libraries that a CUDA kernel calls.
_COMPLAINTS = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")


class MemoryShortageError(Exception):
    """Memory ran out on at least one of the ranks that were evaluating; all of them raise this."""


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that there is too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _COMPLAINTS)


def free_bytes(device: torch.device, *, meminfo: Path = Path("/proc/meminfo")) -> int:
    """The memory that this rank can still use: of its accelerator, or else its share of the machine's.

    Args:
        device: Where its tensors are.
        meminfo: Where Linux says what it has.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not kibibytes:
        return 0  # not Linux: nothing is known, so nothing is taken for granted
    free = min([kibibytes[0] * 1024, *_container_bytes(Path("/sys/fs/cgroup"))])
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _container_bytes(group: Path) -> list[int]:
    """What a container's limit leaves, if there is one."""
    try:
        limit = int((group / "memory.max").read_text())
        return [max(0, limit - int((group / "memory.current").read_text()))]
    except (OSError, ValueError):  # no such files, or "max": no limit
        return []


def mode_bytes(*, copy: int, centre: int, is_sharded: bool) -> dict[str, int]:
    """What modes of evaluation hold besides a rank's shards, the fastest mode first.

    A mode that is not named holds nothing but what a forward gathers.

    Args:
        copy: Bytes of the whole model.
        centre: Bytes of the parameters that are trained.
        is_sharded: Whether ranks hold different elements.
    """
    # Where a replica is one rank's, gathering it costs nothing and the centre need not be kept.
    return ({"iteration": copy + centre} if is_sharded else {}) | {"member": copy}


def cache_bytes(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, num_sharers: int = 1
) -> int:
    """What the keys and values of a micro-batch take; arguments as in ``generation_bytes``."""
    config = model_config.get_text_config()
    heads = config.num_attention_heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_a_token = 2 * config.num_hidden_layers * kept_heads * head_size * dtype.itemsize
    return rows * length * of_a_token // num_sharers


def generation_bytes(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, num_sharers: int = 1
) -> int:
    """About what a micro-batch takes besides the weights: the cache, activations and logits.

    Args:
        model_config: The model's, of transformers.
        rows: Prompts in the micro-batch.
        length: Tokens of a prompt and its answer.
        dtype: The model's.
        num_sharers: Ranks that share the heads and the inner neurons of every layer.
    """
    config = model_config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = (4 * config.hidden_size + 3 * inner // num_sharers) * length * dtype.itemsize
    cache = cache_bytes(model_config, rows=rows, length=length, dtype=dtype, num_sharers=num_sharers)
    return cache + rows * (activations + 2 * 4 * config.vocab_size)


def likelihood_bytes(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, num_sharers: int = 1
) -> int:
    """About what scoring a micro-batch takes besides the weights; arguments as in ``generation_bytes``.

    Logits are kept at every place instead of one.
    """
    logits = rows * length * model_config.get_text_config().vocab_size * dtype.itemsize
    return logits + generation_bytes(
        model_config, rows=rows, length=length, dtype=dtype, num_sharers=num_sharers
    )
