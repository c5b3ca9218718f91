"""The weights digest on a GPU, in Triton."""

import torch

from shardes.noise.definition import (
    BLOCK,
    DIGEST_INDEX_FACTOR,
    DIGEST_MIX_A,
    DIGEST_MIX_B,
    DIGEST_PARAM_FACTOR,
    LANES,
)
from shardes.noise.gpu import kernel, launch, place, within
from shardes.noise.gpu_math import tl, triton
from shardes.noise.region import Region

_MIX_A, _MIX_B = tl.constexpr(DIGEST_MIX_A), tl.constexpr(DIGEST_MIX_B)
_INDEX_FACTOR, _PARAM_FACTOR = tl.constexpr(DIGEST_INDEX_FACTOR), tl.constexpr(DIGEST_PARAM_FACTOR)
_LANES = tl.constexpr(LANES)

# A program makes one atomic addition, all of them to one address: it has 4096 elements before that.
_CALLS = 1024


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * _MIX_A
    value = (value ^ (value >> 27)) * _MIX_B
    return value ^ (value >> 31)


@triton.jit
def _terms(values, index, param, mask):
    """Return the terms of the sum for the elements that ``values`` points to: uint64."""
    stored = tl.load(values, mask=mask)
    if values.dtype.element_ty == tl.float32:
        bits = stored.to(tl.uint32, bitcast=True).to(tl.uint64)
    else:
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint64)
    return tl.where(mask, _mix(_mix(index * _INDEX_FACTOR + param) ^ bits), 0)


@triton.jit
def _sum_of_two(a, b):
    return a + b


@kernel
def _digest(
    values,
    total,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    end_row: tl.int64,
    blocks_per_row: tl.int32,
    param_id: tl.int32,
    size: tl.constexpr,
    calls: tl.constexpr,
    strided: tl.constexpr,
):
    # The noise's blocks and calls serve here as a way to cut the region: four elements a call.
    call, base, inner, low, high = place(
        start, stride, length, first_row, end_row, blocks_per_row, size, calls, strided
    )
    values = values + base + inner
    index = (call // _LANES).to(tl.uint64) * size + (call % _LANES).to(tl.uint64)
    param = param_id.to(tl.uint64) * _PARAM_FACTOR
    terms = _terms(values, index, param, within(0, low, high))
    for quarter in tl.static_range(1, 4):
        offset = quarter * _LANES
        terms += _terms(values + offset, index + offset, param, within(offset, low, high))
    total_of_program = tl.reduce(terms, 0, _sum_of_two)
    tl.atomic_add(total, total_of_program.to(tl.int64, bitcast=True), sem="relaxed")


def add_digest(total: torch.Tensor, values: torch.Tensor, region: Region) -> None:
    """Add the digest of some elements to ``total``; see ``shardes.weights.digest.add_digest``."""
    launch(_digest, BLOCK, _CALLS, (values, total), region, (region.param_id,))
