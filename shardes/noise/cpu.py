"""CPU kernels of the noise, compiled by numba: the bits of definition.py at the speed of the vector unit.

Every kernel walks over the blocks that a region's rows touch, fills a block-sized scratch with noise, and
combines the owned part of it with the tensors. Neither vector width nor the number of threads changes a bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from shardes.noise.cpu_math import (
    FLOAT32,
    FORMATS,
    as_bits,
    as_float,
    f32,
    four_normals,
    load,
    philox,
    store,
    store_randomly,
    u32,
    u64,
)
from shardes.noise.definition import BLOCK, LANES, SIGN_BLOCK, NoiseKind, Stream
from shardes.noise.region import Region
from shardes.threads import split_over_threads

# Elements; see split_over_threads.
_MIN_PER_THREAD = 1 << 15


@nb.njit(inline="always")
def _fill_normals(eps, block, scale, c1, c2, c3, k0, k1):
    """eps[:64] = scale * the normals of a block."""
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        a, b, c, d = four_normals(lane, first_call, word1, c2, c3, k0, k1)
        eps[lane], eps[LANES + lane] = scale * a, scale * b
        eps[2 * LANES + lane], eps[3 * LANES + lane] = scale * c, scale * d


@nb.njit(inline="always")
def _add_normals(total, block, scale, c1, c2, c3, k0, k1):
    """total[:64] += scale * the normals of a block."""
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        a, b, c, d = four_normals(lane, first_call, word1, c2, c3, k0, k1)
        total[lane] += scale * a
        total[LANES + lane] += scale * b
        total[2 * LANES + lane] += scale * c
        total[3 * LANES + lane] += scale * d


@nb.njit(inline="always")
def _fill_signs(eps, block, scale, c1, c2, c3, k0, k1):
    """eps[:2048] = scale * the signs of a block."""
    eps[:] = f32(0)
    _add_signs(eps, block, scale, c1, c2, c3, k0, k1)


@nb.njit(inline="always")
def _add_signs(total, block, scale, c1, c2, c3, k0, k1):
    """total[:2048] += scale * the signs of a block."""
    words = np.empty((4, LANES), np.uint32)
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        a, b, c, d = philox(u32(u32(first_call) + u32(lane)), word1, c2, c3, k0, k1)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = a, b, c, d
    for word in range(4):
        for bit in range(32):
            here = total[(word * 32 + bit) * LANES :]
            for lane in range(LANES):
                sign = u32(words[word, lane] << u32(31 - bit)) & u32(0x80000000)
                here[lane] += as_float(as_bits(scale) ^ sign)


@nb.njit(inline="always")
def _fill_rounding_bits(bits, block, c1, c3, k0, k1):
    """bits[:64] = the random bits with which a block is rounded."""
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        a, b, c, d = philox(u32(u32(first_call) + u32(lane)), word1, u32(Stream.ROUNDING), c3, k0, k1)
        bits[lane], bits[LANES + lane] = a >> u32(16), b >> u32(16)
        bits[2 * LANES + lane], bits[3 * LANES + lane] = c >> u32(16), d >> u32(16)


@functools.cache
def _perturb_kernel(kind: NoiseKind, source_format: int, target_format: int) -> Callable[..., None]:
    """The kernel for one kind and pair of formats; compiled when first used, then kept on disk by numba."""
    fill, size = _BLOCKS[kind]

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def perturb(
        first,
        last,
        per_row,
        start,
        stride,
        length,
        source,
        target,
        sigma,
        c1,
        c2,
        c3,
        k0,
        k1,
    ):
        eps = np.empty(size, np.float32)
        row, block_in_row = first // per_row, first % per_row
        for _ in range(first, last):
            row_start = start + row * stride
            block = row_start // size + block_in_row
            low, high = max(block * size, row_start), min((block + 1) * size, row_start + length)
            if low < high:
                fill(eps, block, sigma, c1, c2, c3, k0, k1)
                offset = row * length - row_start
                here, there = source[low + offset : high + offset], target[low + offset : high + offset]
                owned = eps[low - block * size :]
                for j in range(here.size):
                    centre = load(store(load(here[j], source_format), target_format), target_format)
                    there[j] = store(centre + owned[j], target_format)
            block_in_row += 1
            if block_in_row == per_row:
                row, block_in_row = row + 1, 0

    return perturb


@functools.cache
def _accumulate_kernel(kind: NoiseKind, master_format: int) -> Callable[..., None]:
    """As ``_perturb_kernel``."""
    add, size = _SUMS[kind]

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def accumulate(
        first,
        last,
        per_row,
        start,
        stride,
        length,
        master,
        coefficients,
        c1,
        c2,
        c3,
        k0,
        k1,
    ):
        total, bits = np.empty(size, np.float32), np.empty(BLOCK, np.uint32)
        row, block_in_row = first // per_row, first % per_row
        for _ in range(first, last):
            row_start = start + row * stride
            block = row_start // size + block_in_row
            low, high = max(block * size, row_start), min((block + 1) * size, row_start + length)
            if low < high:
                total[:] = f32(0)
                for n in range(c2.size):
                    add(total, block, coefficients[n], c1, c2[n], c3, k0, k1)
                offset = row * length - row_start
                here, owned = master[low + offset : high + offset], total[low - block * size :]
                if master_format == FLOAT32:
                    for j in range(here.size):
                        here[j] = as_bits(as_float(here[j]) + owned[j])
                else:
                    for part in range(low // BLOCK, (high - 1) // BLOCK + 1):
                        _fill_rounding_bits(bits, part, c1, c3, k0, k1)
                        begin, end = max(part * BLOCK, low), min((part + 1) * BLOCK, high)
                        for j in range(begin - low, end - low):
                            moved = load(here[j], master_format) + owned[j]
                            here[j] = store_randomly(moved, bits[low + j - part * BLOCK], master_format)
            block_in_row += 1
            if block_in_row == per_row:
                row, block_in_row = row + 1, 0

    return accumulate


_BLOCKS = {NoiseKind.GAUSSIAN: (_fill_normals, BLOCK), NoiseKind.RADEMACHER: (_fill_signs, SIGN_BLOCK)}
_SUMS = {NoiseKind.GAUSSIAN: (_add_normals, BLOCK), NoiseKind.RADEMACHER: (_add_signs, SIGN_BLOCK)}


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    region: Region,
    *,
    sigma: float,
    kind: NoiseKind,
    words: tuple[int, int, int],
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.perturb``; ``words`` are the counter words 1 to 3."""
    kernel = _perturb_kernel(kind, FORMATS[source.dtype], FORMATS[target.dtype])
    numbers = (u32(word) for word in (*words, *key))
    _over_blocks(kernel, region, _BLOCKS[kind][1], stored(source), stored(target), f32(sigma), *numbers)


def accumulate(
    master: torch.Tensor,
    region: Region,
    *,
    coefficients: Sequence[float],
    kind: NoiseKind,
    word1: int,
    direction_words: Sequence[int],
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.accumulate``; the words are those of the counter."""
    _over_blocks(
        _accumulate_kernel(kind, FORMATS[master.dtype]),
        region,
        _SUMS[kind][1],
        stored(master),
        np.asarray(coefficients, np.float32),
        u32(word1),
        np.asarray(direction_words, np.uint32),
        u32(word3),
        *(u32(word) for word in key),
    )


def _over_blocks(kernel: Callable[..., None], region: Region, size: int, *arguments: Any) -> None:
    """Runs a kernel over the blocks of ``size`` elements that each row may touch, on several threads."""
    start, stride, length = region.start, region.stride, region.length
    # With one row it is known; rows that start anywhere may touch one block more than they fill.
    per_row = (start % size + length - 1 if region.rows == 1 else length + size - 2) // size + 1
    split_over_threads(
        kernel,
        region.rows * per_row,
        per_row,
        start,
        stride,
        length,
        *arguments,
        at_least=max(_MIN_PER_THREAD // size, 1),
    )


def stored(tensor: torch.Tensor) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """The storage of a contiguous CPU tensor as flat unsigned integers of its element size; no copy."""
    width = torch.uint32 if tensor.dtype == torch.float32 else torch.uint16
    return tensor.detach().view(-1).view(width).numpy()
