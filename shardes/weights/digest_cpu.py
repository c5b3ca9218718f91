"""The weights digest on a CPU, compiled by numba."""

import numba as nb
import numpy as np
import torch

from shardes.noise.cpu import stored
from shardes.noise.definition import (
    DIGEST_INDEX_FACTOR,
    DIGEST_MIX_A,
    DIGEST_MIX_B,
    DIGEST_PARAM_FACTOR,
)
from shardes.noise.region import Region
from shardes.utils.compiling import compile_kernel
from shardes.utils.threads import split_over_threads

u64 = np.uint64
_A, _B = u64(DIGEST_MIX_A), u64(DIGEST_MIX_B)
_INDEX, _PARAM = u64(DIGEST_INDEX_FACTOR), u64(DIGEST_PARAM_FACTOR)
# Elements handled before the next look at rows, and the least that is worth a thread.
_PART, _PARTS_PER_THREAD = 1 << 12, 8


@nb.njit(inline="always")
def _mix(value):
    value = (value ^ (value >> u64(30))) * _A
    value = (value ^ (value >> u64(27))) * _B
    return value ^ (value >> u64(31))


@compile_kernel
def _digest(first, last, per_row, start, stride, length, bits, param):
    total = u64(0)
    for part in range(first, last):
        row, low = part // per_row, (part % per_row) * _PART
        here = bits[row * length + low : row * length + min(low + _PART, length)]
        index = u64(start + row * stride + low)
        for j in range(here.size):
            total += _mix(_mix((index + u64(j)) * _INDEX + param * _PARAM) ^ u64(here[j]))
    return total


def add_digest(total: torch.Tensor, values: torch.Tensor, region: Region) -> None:
    """Add the digest of some elements to ``total``; see ``shardes.weights.digest.add_digest``."""
    per_row = -(-region.length // _PART)
    sums = split_over_threads(
        _digest,
        region.rows * per_row,
        per_row,
        region.start,
        region.stride,
        region.length,
        stored(values),
        u64(region.param_id),
        at_least=_PARTS_PER_THREAD,
    )
    held = total.numpy().view(np.uint64)
    for part in sums:
        held += u64(part)
