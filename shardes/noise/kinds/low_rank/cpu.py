"""CPU kernels of the low-rank noise, compiled by numba: outer products in the definition's order.

No fast-math: the compiler may use vector instructions but may not change a bit.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from shardes.noise.cpu import MIN_PER_THREAD, checksum, fill_rounding_bits, stored, update_words
from shardes.noise.cpu_math import (
    FLOAT32,
    FORMATS,
    as_bits,
    as_float,
    f32,
    load,
    store,
    store_randomly,
    u32,
    u64,
)
from shardes.noise.definition import BLOCK, Ints
from shardes.noise.kinds.gaussian import cpu as gaussian_cpu
from shardes.noise.kinds.gaussian.cpu import PAIR, fill_normals
from shardes.noise.kinds.low_rank.tables import Factors, Tile
from shardes.utils.compiling import compile_kernel
from shardes.utils.threads import split_over_threads

# Rows and columns whose sums are computed together; with three terms at a time they fit the registers.
_ROWS, _STRIP = 4, 512
_SOURCES = checksum(gaussian_cpu.__file__)


@functools.cache
def _table_kernel() -> Callable[..., None]:
    """Compile the kernel that fills tables at its first call; numba keeps it on disk."""
    sources = _SOURCES

    @compile_kernel
    def table(first, last, out, begin, scale, directions, words, key):
        _ = sources
        eps = np.empty(PAIR, np.float32)
        (c1, c3), (k0, k1) = words, key
        _, rank, count = out.shape
        begin = begin * rank
        end = begin + count * rank
        for n in range(first, last):
            for pair_start in range(begin // PAIR * PAIR, end, PAIR):
                first_call = u64(pair_start // 4)
                word1 = u32(c1 | u32(first_call >> u64(32)))
                fill_normals(eps, first_call, scale, word1, directions[n], c3, k0, k1)
                low, high = max(begin, pair_start), min(end, pair_start + PAIR)
                if rank == 1:
                    out[n, 0, low - begin : high - begin] = eps[low - pair_start : high - pair_start]
                else:
                    for j in range(low, high):
                        out[n, (j - begin) % rank, (j - begin) // rank] = eps[j - pair_start]

    return table


@functools.cache
def _perturb_kernel(source_format: int, target_format: int) -> Callable[..., None]:
    """Compile the kernel that perturbs, for a pair of formats."""
    sources = _SOURCES

    @compile_kernel
    def perturb(first, last, source, target, offset, pitch, left, right, sigma):
        _ = sources
        terms, columns = right.shape
        eps = np.empty(columns, np.float32)
        for row in range(first, last):
            eps[:] = f32(0)
            for term in range(terms):
                scale, other = left[term, row], right[term]
                for j in range(columns):
                    eps[j] += scale * other[j]
            begin = offset + row * pitch
            here, there = source[begin : begin + columns], target[begin : begin + columns]
            for j in range(columns):
                centre = load(store(load(here[j], source_format), target_format), target_format)
                there[j] = store(centre + sigma * eps[j], target_format)

    return perturb


@nb.njit(inline="always")
def _add_products(totals, lefts, right, low, high):
    """Add the products of ``_ROWS`` rows with some columns to their sums, one term after the other."""
    terms, columns = right.shape[0], high - low
    sum0, sum1, sum2, sum3 = totals
    num_in_threes = terms - terms % 3
    for t in range(0, num_in_threes, 3):
        # Read here, not in the loop below: what is read there might, for all the compiler knows, be written.
        a0, a1, a2 = lefts[0, t], lefts[0, t + 1], lefts[0, t + 2]
        b0, b1, b2 = lefts[1, t], lefts[1, t + 1], lefts[1, t + 2]
        c0, c1, c2 = lefts[2, t], lefts[2, t + 1], lefts[2, t + 2]
        d0, d1, d2 = lefts[3, t], lefts[3, t + 1], lefts[3, t + 2]
        other0, other1, other2 = right[t, low:high], right[t + 1, low:high], right[t + 2, low:high]
        for j in range(columns):
            x0, x1, x2 = other0[j], other1[j], other2[j]
            sum0[j] = ((sum0[j] + a0 * x0) + a1 * x1) + a2 * x2
            sum1[j] = ((sum1[j] + b0 * x0) + b1 * x1) + b2 * x2
            sum2[j] = ((sum2[j] + c0 * x0) + c1 * x1) + c2 * x2
            sum3[j] = ((sum3[j] + d0 * x0) + d1 * x1) + d2 * x2
    for t in range(num_in_threes, terms):
        a0, b0, c0, d0 = lefts[0, t], lefts[1, t], lefts[2, t], lefts[3, t]
        other0 = right[t, low:high]
        for j in range(columns):
            sum0[j] += a0 * other0[j]
            sum1[j] += b0 * other0[j]
            sum2[j] += c0 * other0[j]
            sum3[j] += d0 * other0[j]


@functools.cache
def _accumulate_kernel(master_format: int) -> Callable[..., None]:
    """Compile the kernel that accumulates, for a format."""
    sources = _SOURCES

    @compile_kernel
    def accumulate(first, last, master, offset, pitch, left, right, start, words, key):
        _ = sources
        terms, columns = right.shape
        totals = np.empty((_ROWS, _STRIP), np.float32)
        lefts = np.empty((_ROWS, terms), np.float32)
        bits = np.empty(_STRIP + 2 * BLOCK, np.uint32)
        (index, width), (c1, c3), (k0, k1) = start, words, key
        rows = left.shape[1]
        for band in range(first, last):
            top = band * _ROWS
            for place in range(_ROWS):
                for t in range(terms):
                    lefts[place, t] = left[t, min(top + place, rows - 1)]
            for low in range(0, columns, _STRIP):
                high = min(low + _STRIP, columns)
                totals[:] = f32(0)
                _add_products((totals[0], totals[1], totals[2], totals[3]), lefts, right, low, high)
                for row in range(top, min(top + _ROWS, rows)):
                    begin = offset + row * pitch
                    here, moved = master[begin + low : begin + high], totals[row - top]
                    if master_format == FLOAT32:
                        for j in range(here.size):
                            here[j] = as_bits(as_float(here[j]) + moved[j])
                    else:
                        element = index + row * width + low
                        first_block = element // BLOCK
                        for block in range(first_block, (element + here.size - 1) // BLOCK + 1):
                            fill_rounding_bits(bits[(block - first_block) * BLOCK :], block, c1, c3, k0, k1)
                        drawn = bits[element % BLOCK :]
                        for j in range(here.size):
                            value = load(here[j], master_format) + moved[j]
                            here[j] = store_randomly(value, drawn[j], master_format)

    return accumulate


def table(first: int, count: int, *, factors: Factors, words2: Ints, scale: float) -> Tensor:
    """Compute rows of a factor in some directions, each element times ``scale``.

    Returns:
        float32 of shape [directions, rank, count].
    """
    out = torch.empty(len(words2), factors.rank, count, device=factors.device)
    at_least = max(MIN_PER_THREAD // max(factors.rank * count, 1), 1)
    terms = f32(scale), np.asarray(words2, np.uint32), *update_words(factors.param_id, factors.key)
    split_over_threads(_table_kernel(), len(words2), out.numpy(), first, *terms, at_least=at_least)
    return out


def perturb(source: Tensor, target: Tensor, tile: Tile, left: Tensor, right: Tensor, *, sigma: float) -> None:
    """Perturb a tile; the factors are of shape [rank, rows] and [rank, columns]."""
    kernel = _perturb_kernel(FORMATS[source.dtype], FORMATS[target.dtype])
    _over_bands(kernel, 1, (source, target), tile, (left, right), f32(sigma))


def accumulate(master: Tensor, tile: Tile, left: Tensor, right: Tensor, *, factors: Factors) -> None:
    """Add a weighted sum of eps to a tile; the factors are of shape [terms, rows] and [terms, columns]."""
    kernel, words = _accumulate_kernel(FORMATS[master.dtype]), update_words(factors.param_id, factors.key)
    _over_bands(kernel, _ROWS, (master,), tile, (left, right), factors.place(tile), *words)


def _over_bands(
    kernel: Callable[..., None],
    rows: int,
    tensors: tuple[Tensor, ...],
    tile: Tile,
    factors: tuple[Tensor, Tensor],
    *arguments: Any,
) -> None:
    """Run a kernel over a tile, of which each part is a band of ``rows`` rows, on several threads."""
    held, at_least = map(stored, tensors), max(MIN_PER_THREAD // (rows * tile.columns), 1)
    place = tile.offset, tile.pitch, *(factor.numpy() for factor in factors)
    split_over_threads(kernel, -(-tile.rows // rows), *held, *place, *arguments, at_least=at_least)
