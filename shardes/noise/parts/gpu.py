"""GPU kernels of noise that covers one part of the parameters, in Triton.

A program handles a chunk of a block: of the part, where members are perturbed or restored, and of any in an
update, where it adds the noise of the block's part. So the part is a number of the whole program, and no
thread idles for another part.
"""

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardes.noise.definition import BLOCK, LANES, Floats, Ints, NoiseKey, Stream, seed_key
from shardes.noise.gpu import WARPS, Fill, copy_table, kernel, on_device, update_words
from shardes.noise.gpu_math import as_float, perturbed, philox, tl, triton
from shardes.noise.parts import Parts, part_of_direction
from shardes.noise.region import Region

_LANES, _PARTS = tl.constexpr(LANES), tl.constexpr(int(Stream.PARTS))

# Calls of a program that computes shifts, and elements of one that restores.
_SHIFT_CALLS = 128
_RESTORED = 8 * BLOCK
# Programs of a launch, below 2**31.
_MAX_PROGRAMS = 2**30


@kernel
def _shift(
    out,
    first_call: tl.int64,
    num_calls: tl.int64,
    num_parts: tl.int64,
    c1: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    calls: tl.constexpr,
):
    c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    place = tl.program_id(0).to(tl.int64) * calls + tl.arange(0, calls)
    c2 = tl.full([1], _PARTS, tl.uint32)
    word0, word1, word2, word3 = philox((first_call + place).to(tl.uint32), c1, c2, c3, k0, k1)
    mask, parts = place < num_calls, num_parts.to(tl.uint64)
    tl.store(out + 4 * place, ((word0.to(tl.uint64) * parts) >> 32).to(tl.int32), mask=mask)
    tl.store(out + 4 * place + 1, ((word1.to(tl.uint64) * parts) >> 32).to(tl.int32), mask=mask)
    tl.store(out + 4 * place + 2, ((word2.to(tl.uint64) * parts) >> 32).to(tl.int32), mask=mask)
    tl.store(out + 4 * place + 3, ((word3.to(tl.uint64) * parts) >> 32).to(tl.int32), mask=mask)


@triton.jit
def _row_of(start, stride, length, first_row, per_row):
    """Return a program's place in its row, the row's first element, and where it lies in the tensor."""
    row_of_launch = tl.program_id(0) // per_row
    row = first_row + row_of_launch.to(tl.int64)
    return tl.program_id(0) - row_of_launch * per_row, start + row * stride, row * length


@triton.jit
def _chunk_of_part(place, row_start, shifts, first_group, part, num_parts, chunks, chunk: tl.constexpr):
    """Return the number of a chunk of a part's block, the ``place``-th in the groups that a row touches."""
    group_of_row = place // chunks
    group = row_start // (num_parts * chunks * chunk) + group_of_row
    shift = tl.load(shifts + (group - first_group)).to(tl.int64)
    block = group * num_parts + (part + num_parts - shift) % num_parts
    return block * chunks + (place - group_of_row * chunks)


@triton.jit
def _owned(number, row_start, length, chunk: tl.constexpr):
    """Return where a chunk begins in its row, and the range of its elements that the row has."""
    begin = number * chunk - row_start
    return begin, tl.maximum(-begin, 0).to(tl.int32), tl.minimum(length - begin, chunk).to(tl.int32)


@triton.jit
def _calls_of(number, calls: tl.constexpr, size: tl.constexpr):
    """Return the calls of a chunk, and where the first element of each lies in it."""
    thread = tl.arange(0, calls)
    call = (number * calls).to(tl.uint32) + thread.to(tl.uint32)
    return call, thread // _LANES * size + thread % _LANES


@kernel
def _perturb(
    source,
    target,
    shifts,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    per_row: tl.int32,
    first_group: tl.int64,
    part: tl.int64,
    num_parts: tl.int64,
    chunks: tl.int64,
    sigma_bits: tl.uint32,
    c1: tl.uint32,
    c2: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    chunk: tl.constexpr,
    calls: tl.constexpr,
    size: tl.constexpr,
    always_masked: tl.constexpr,
    perturb_calls: tl.constexpr,
):
    # Under the interpreter an argument has whatever type its value fits.
    sigma_bits = sigma_bits.to(tl.uint32)
    c1, c2, c3 = c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    place, row_start, row_base = _row_of(start, stride, length, first_row, per_row)
    number = _chunk_of_part(place, row_start, shifts, first_group, part, num_parts, chunks, chunk)
    begin, low, high = _owned(number, row_start, length, chunk)
    if low < high:
        call, inner = _calls_of(number, calls, size)
        here, there = source + (row_base + begin) + inner, target + (row_base + begin) + inner
        if always_masked:
            perturb_calls(here, there, sigma_bits, call, c1, c2, c3, k0, k1, low - inner, high - inner, True)
        elif high - low == chunk:
            perturb_calls(here, there, sigma_bits, call, c1, c2, c3, k0, k1, low - inner, high - inner, False)
        else:
            perturb_calls(here, there, sigma_bits, call, c1, c2, c3, k0, k1, low - inner, high - inner, True)


@kernel
def _restore(
    source,
    target,
    shifts,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    per_row: tl.int32,
    first_group: tl.int64,
    part: tl.int64,
    num_parts: tl.int64,
    chunks: tl.int64,
    chunk: tl.constexpr,
):
    place, row_start, row_base = _row_of(start, stride, length, first_row, per_row)
    number = _chunk_of_part(place, row_start, shifts, first_group, part, num_parts, chunks, chunk)
    begin, low, high = _owned(number, row_start, length, chunk)
    if low < high:
        inner = tl.arange(0, chunk)
        mask = (low <= inner) & (inner < high)
        # Adding -0 changes no bit of any number; written as such, it would be 0 - 0, which is +0.
        nothing = as_float(tl.full([1], 0x80000000, tl.uint32))
        values = tl.load(source + (row_base + begin) + inner, mask=mask)
        tl.store(
            target + (row_base + begin) + inner,
            perturbed(values, nothing, target.dtype.element_ty),
            mask=mask,
        )


@kernel
def _accumulate(
    master,
    table,
    shifts,
    start: tl.int64,
    stride: tl.int64,
    length: tl.int64,
    first_row: tl.int64,
    per_row: tl.int32,
    first_group: tl.int64,
    num_parts: tl.int64,
    chunks: tl.int64,
    c1: tl.uint32,
    c3: tl.uint32,
    k0: tl.uint32,
    k1: tl.uint32,
    chunk: tl.constexpr,
    calls: tl.constexpr,
    size: tl.constexpr,
    accumulate_calls: tl.constexpr,
):
    c1, c3, k0, k1 = c1.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    place, row_start, row_base = _row_of(start, stride, length, first_row, per_row)
    number = row_start // chunk + place
    begin, low, high = _owned(number, row_start, length, chunk)
    if low < high:
        block = number // chunks
        group = block // num_parts
        shift = tl.load(shifts + (group - first_group)).to(tl.int64)
        part = (block - group * num_parts + shift) % num_parts
        first_term = tl.load(table + part)
        num_terms = tl.load(table + part + 1) - first_term
        # The table: where each part's terms begin, then the coefficients and words of each part.
        terms = table + num_parts + 1 + 2 * first_term
        call, inner = _calls_of(number, calls, size)
        here = master + (row_base + begin) + inner
        accumulate_calls(here, terms, num_terms, call, c1, c3, k0, k1, low - inner, high - inner)


def perturb(
    source: Tensor,
    target: Tensor,
    region: Region,
    *,
    fill: Fill,
    parts: Parts,
    sigma: float,
    word2: int,
    key: NoiseKey,
    direction: int,
) -> None:
    """Perturb the elements of a direction's part as ``shardes.noise.perturb`` does."""
    # As bits: every version of Triton, and its interpreter, passes an integer unchanged.
    sigma_bits = int(np.float32(sigma).view(np.uint32))
    words = (region.param_id << 8, word2, key.iteration, *seed_key(key.seed))
    numbers = (
        part_of_direction(direction, parts.num),
        parts.num,
        parts.block // fill.part_chunk,
        sigma_bits,
        *words,
    )
    functions = {"perturb_calls": fill.perturb_calls, "always_masked": fill.always_masked}
    per_row = parts.per_row(region, parts.group) * (parts.block // fill.part_chunk)
    _launch(_perturb, (source, target), region, parts, key, per_row, numbers, **_sizes(fill), **functions)


def restore(
    source: Tensor, target: Tensor, region: Region, *, parts: Parts, key: NoiseKey, direction: int
) -> None:
    """Restore the elements of a direction's part as ``shardes.noise.restore`` does."""
    chunks = parts.block // _RESTORED
    numbers = part_of_direction(direction, parts.num), parts.num, chunks
    per_row = parts.per_row(region, parts.group) * chunks
    _launch(_restore, (source, target), region, parts, key, per_row, numbers, chunk=_RESTORED)


def accumulate(
    master: Tensor,
    region: Region,
    *,
    fill: Fill,
    parts: Parts,
    coefficients: Floats,
    words2: Ints,
    key: NoiseKey,
    directions: Ints,
) -> None:
    """Accumulate as ``shardes.noise.accumulate`` does, each direction in its part."""
    bounds, scaled, words = parts.by_part(coefficients, words2, directions)
    terms = [bounds.astype(np.int32)]
    for first, end in itertools.pairwise(bounds):
        terms += [scaled[first:end].view(np.int32), words[first:end].view(np.int32)]
    with on_device(master.device):
        stream = torch.cuda.current_stream().cuda_stream if master.is_cuda else 0
        table = copy_table(np.concatenate(terms).tobytes(), master.device, stream)
    numbers = parts.num, parts.block // fill.part_chunk, *update_words(region.param_id, key)
    per_row, function = parts.per_row(region, fill.part_chunk), {"accumulate_calls": fill.accumulate_calls}
    _launch(_accumulate, (master, table), region, parts, key, per_row, numbers, **_sizes(fill), **function)


def _sizes(fill: Fill) -> dict[str, int]:
    """Return the elements and calls of a chunk, and the elements of LANES calls."""
    return {"chunk": fill.part_chunk, "calls": fill.part_chunk // fill.size * LANES, "size": fill.size}


def _shifts(parts: Parts, region: Region, key: NoiseKey, device: torch.device) -> tuple[Tensor, int]:
    """Compute by how much parts are shifted in the groups that a region touches.

    Returns:
        Numbers below the number of parts, int32, and the group that the first of them belongs to.
    """
    first, count = parts.groups(region.start, region.end)
    first_call = first // 4
    num_calls = -(-(first + count) // 4) - first_call
    out = torch.empty(4 * num_calls, dtype=torch.int32, device=device)
    with on_device(device):
        grid = (-(-num_calls // _SHIFT_CALLS),)
        words = update_words(region.param_id, key)
        options: dict[str, Any] = {"calls": _SHIFT_CALLS, "num_warps": WARPS}
        _shift[grid](out, first_call, num_calls, parts.num, *words, **options)
    return out, 4 * first_call


def _launch(
    function: Any,
    tensors: tuple[Tensor, Tensor],
    region: Region,
    parts: Parts,
    key: NoiseKey,
    per_row: int,
    numbers: tuple[int, ...],
    **constants: Any,
) -> None:
    """Run a kernel with a program for each chunk that a row of a region may touch.

    Args:
        function: Kernel.
        tensors: First arguments of the kernel, on one device.
        region: Elements that the tensors hold.
        parts: Division into parts.
        key: Key of the division.
        per_row: Programs of a row.
        numbers: Last arguments.
        **constants: Compile-time constants.
    """
    rows_at_once = max(_MAX_PROGRAMS // per_row, 1)
    shifts, first_group = _shifts(parts, region, key, tensors[0].device)
    with on_device(tensors[0].device):
        for first_row in range(0, region.rows, rows_at_once):
            rows = min(rows_at_once, region.rows - first_row)
            function[(rows * per_row,)](
                *tensors,
                shifts,
                region.start,
                region.stride,
                region.length,
                first_row,
                per_row,
                first_group,
                *numbers,
                **constants,
                num_warps=WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )
