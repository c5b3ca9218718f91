"""Estimate the memory that is free and that micro-batches take, and recognise shortages."""

from pathlib import Path
from typing import Any

import torch

from shardes.distributed.place import num_local_ranks

# Part of an accelerator's memory that is left to the driver, the communication library and fragmentation.
RESERVED_BYTES = 2 * 2**30
# What messages of a shortage contain, in lower case: those of CUDA (whose graphs, modules and kernels take
# memory, too), NCCL and Triton; of cuBLAS, cuDNN and their like; and of CPUs' allocators. A handle of cuBLAS
# that finds no memory for its workspace says that it is not initialized.
_COMPLAINTS = (
    "out of memory",
    "alloc_failed",
    "cublas_status_not_initialized",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
)


class MemoryShortageError(Exception):
    """Memory ran out on at least one of the ranks that were evaluating; all of them raise this."""


def is_shortage(error: BaseException) -> bool:
    """Return True if an exception reports that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in message for text in _COMPLAINTS)


def free_bytes(device: torch.device, *, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes that this rank can still use: of its accelerator, or a share of the machine's memory.

    Args:
        device: Device of the rank's tensors.
        meminfo: File in which Linux reports memory; without it, 0 bytes are free on a CPU.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not kibibytes:
        return 0  # not Linux: nothing is known, so nothing is taken for granted
    free = min([kibibytes[0] * 1024, *_container_bytes(Path("/sys/fs/cgroup"))])
    return free // num_local_ranks()


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes of free memory that a choice must leave: of an accelerator, ``RESERVED_BYTES``."""
    return 0 if device.type == "cpu" else RESERVED_BYTES


def _container_bytes(group: Path) -> list[int]:
    """Return the bytes that the memory limit of a control group leaves, in a list; empty without a limit."""
    try:
        limit = int((group / "memory.max").read_text())
        return [max(0, limit - int((group / "memory.current").read_text()))]
    except (OSError, ValueError):  # no such files, or "max": no limit
        return []


def mode_bytes(*, copy: int, centre: int, is_sharded: bool) -> dict[str, int]:
    """Return the bytes that gather modes hold besides a rank's shards, by mode, the fastest mode first.

    A mode that is missing holds nothing but the weights that a forward gathers.

    Args:
        copy: Bytes of the whole model.
        centre: Bytes of the trained parameters.
        is_sharded: True if the ranks of a replica hold different elements.
    """
    # Where a replica is one rank's, gathering it costs nothing and the centre need not be kept.
    return ({"iteration": copy + centre} if is_sharded else {}) | {"member": copy}


def cache_bytes(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, num_sharers: int = 1
) -> int:
    """Compute the bytes of a micro-batch's keys and values; arguments as in ``generation_bytes``."""
    config = model_config.get_text_config()
    heads = config.num_attention_heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_a_token = 2 * config.num_hidden_layers * kept_heads * head_size * dtype.itemsize
    return rows * length * of_a_token // num_sharers


def generation_bytes(
    model_config: Any,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    num_sharers: int = 1,
    prompt_length: int | None = None,
) -> int:
    """Estimate the bytes of a micro-batch besides the weights: its cache, activations and logits.

    Args:
        model_config: Configuration of the model, a transformers ``PretrainedConfig``.
        rows: Number of rows in the micro-batch.
        length: Tokens of a prompt and its answer together.
        prompt_length: Tokens of a prompt, which are computed together and have the most activations; None:
            all ``length`` are computed together.
        dtype: Dtype of weights and activations.
        num_sharers: Number of ranks that share the heads and the inner neurons of each layer.
    """
    config = model_config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    at_once = length if prompt_length is None else prompt_length
    activations = (4 * config.hidden_size + 3 * inner // num_sharers) * at_once * dtype.itemsize
    cache = cache_bytes(model_config, rows=rows, length=length, dtype=dtype, num_sharers=num_sharers)
    return cache + rows * (activations + 2 * 4 * config.vocab_size)


def likelihood_bytes(
    model_config: Any, *, rows: int, length: int, dtype: torch.dtype, num_sharers: int = 1
) -> int:
    """Estimate the bytes of scoring a micro-batch besides the weights; arguments as in ``generation_bytes``.

    Logits are kept for each token, instead of for the last one.
    """
    logits = rows * length * model_config.get_text_config().vocab_size * dtype.itemsize
    return logits + generation_bytes(
        model_config, rows=rows, length=length, dtype=dtype, num_sharers=num_sharers
    )
