"""Tensors in pinned host memory, in few blocks.

torch rounds each block of pinned memory up to a power of two, so that a tensor by itself may take twice its
bytes. Tensors are therefore views of blocks of such sizes, packed by the sizes alone: ``shardes plan`` counts
what a run takes.
"""

from collections.abc import Mapping

import torch

# Size of the largest block, unless a tensor is larger.
MAX_BLOCK_BYTES = 2**34
# Views begin at multiples of it, as tensors of their own would.
ALIGNMENT_BYTES = 512


def pack(sizes: Mapping[str, int]) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Distribute tensors over blocks, of the size with which all together take the least memory.

    Args:
        sizes: Bytes of each tensor, by name.

    Returns:
        Bytes of each block, powers of two, and each tensor's block and the byte that it begins at.
    """
    largest = power_of_two(max(sizes.values(), default=1))
    limits = [largest]
    while limits[-1] < min(MAX_BLOCK_BYTES, sum(sizes.values())):
        limits.append(2 * limits[-1])
    return min((_pack(sizes, limit=limit) for limit in limits), key=lambda packed: sum(packed[0]))


def _pack(sizes: Mapping[str, int], *, limit: int) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Put each tensor, the largest first, into the first block with room; halve blocks half empty."""
    used: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        block = next((i for i, taken in enumerate(used) if taken + size <= limit), len(used))
        if block == len(used):
            used.append(0)
        places[name] = block, used[block]
        used[block] += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return [power_of_two(min(taken, limit)) for taken in used], places


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def pinned_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of pinned memory that tensors of these sizes in bytes take."""
    return sum(pack(sizes)[0])


def pinned_zeros(lengths: Mapping[str, int], *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Allocate flat tensors of zeros in pinned memory.

    Args:
        lengths: Number of elements of each, by name.
        dtype: Dtype of all.
    """
    blocks, places = pack({name: length * dtype.itemsize for name, length in lengths.items()})
    storage = [_allocate(size) for size in blocks]
    views = {}
    for name, length in lengths.items():
        block, begin = places[name]
        views[name] = storage[block][begin : begin + length * dtype.itemsize].view(dtype)
    return views


def _allocate(num_bytes: int) -> torch.Tensor:
    """Return zeros in pinned memory, which takes an accelerator."""
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
