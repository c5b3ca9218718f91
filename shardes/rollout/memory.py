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


def generation_bytes(model_config: Any, *, rows: int, length: int, dtype: torch.dtype) -> int:
    """About what a micro-batch takes besides the weights: the cache, activations and logits.

    Args:
        model_config: The model's, of transformers.
        rows: Prompts in the micro-batch.
        length: Tokens of a prompt and its answer.
        dtype: The model's.
    """
    config = model_config.get_text_config()
    hidden = config.hidden_size
    heads = config.num_attention_heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or hidden // heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    cache = 2 * config.num_hidden_layers * kept_heads * head_size * length
    activations = (4 * hidden + 3 * inner) * length
    return rows * ((cache + activations) * dtype.itemsize + 2 * 4 * config.vocab_size)
