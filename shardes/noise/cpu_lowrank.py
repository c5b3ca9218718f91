"""CPU kernels of the low-rank noise, compiled by numba: outer products in the order of definition.py.

No fast-math: the compiler may use vector instructions but may not change a bit.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numba as nb
import numpy as np
import torch

from shardes.noise import cpu, cpu_math, definition
from shardes.noise.cpu import PAIR, fill_normals, fill_rounding_bits, stored, words_of
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
from shardes.noise.definition import BLOCK
from shardes.noise.lowrank import Tile
from shardes.threads import split_over_threads

# Columns whose sums are made together: those of two rows, and of four terms, stay in the fastest cache.
_STRIP = 512
_MIN_PER_THREAD = 1 << 15  # elements; see split_over_threads
# See cpu.py: numba must know what its kernels are made of in other files.
_OTHER_FILES = (cpu, cpu_math, definition)
_SOURCES = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in _OTHER_FILES))


@functools.cache
def _table_kernel() -> Callable[..., None]:
    """The kernel that fills tables; compiled when first used, then kept on disk by numba."""
    sources = _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def table(first, last, out, begin, rank, scale, directions, c1, c3, key):
        _ = sources
        eps = np.empty(PAIR, np.float32)
        k0, k1 = key
        count = out.shape[2]
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
    """As ``_table_kernel``, for a pair of formats."""
    sources = _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
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
def _add_products(total0, total1, above, below, right, low, high):
    """Adds the products of two rows with some columns to their sums, one term after the other."""
    terms, columns = right.shape[0], high - low
    num_in_fours = terms - terms % 4
    for t in range(0, num_in_fours, 4):
        # Read here, not in the loop below: what is read there might, for all the compiler knows, be written.
        a0, a1, a2, a3 = above[t], above[t + 1], above[t + 2], above[t + 3]
        b0, b1, b2, b3 = below[t], below[t + 1], below[t + 2], below[t + 3]
        other0, other1 = right[t, low:high], right[t + 1, low:high]
        other2, other3 = right[t + 2, low:high], right[t + 3, low:high]
        for j in range(columns):
            x0, x1, x2, x3 = other0[j], other1[j], other2[j], other3[j]
            total0[j] = (((total0[j] + a0 * x0) + a1 * x1) + a2 * x2) + a3 * x3
            total1[j] = (((total1[j] + b0 * x0) + b1 * x1) + b2 * x2) + b3 * x3
    for t in range(num_in_fours, terms):
        a0, b0, other0 = above[t], below[t], right[t, low:high]
        for j in range(columns):
            total0[j] += a0 * other0[j]
            total1[j] += b0 * other0[j]


@functools.cache
def _accumulate_kernel(master_format: int) -> Callable[..., None]:
    """As ``_table_kernel``, for a format."""
    sources = _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def accumulate(first, last, master, offset, pitch, left, right, place, words, key):
        _ = sources
        terms, columns = right.shape
        total = np.empty((2, _STRIP), np.float32)
        above, below = np.empty(terms, np.float32), np.empty(terms, np.float32)
        bits = np.empty(_STRIP + 2 * BLOCK, np.uint32)
        (index, width), (c1, c3), (k0, k1) = place, words, key
        rows = left.shape[1]
        for low in range(0, columns, _STRIP):
            high = min(low + _STRIP, columns)
            for pair in range(first, last):
                lower = min(2 * pair + 1, rows - 1)
                for t in range(terms):
                    above[t], below[t] = left[t, 2 * pair], left[t, lower]
                total[:] = f32(0)
                _add_products(total[0], total[1], above, below, right, low, high)
                for row in range(2 * pair, lower + 1):
                    begin = offset + row * pitch
                    here, moved = master[begin + low : begin + high], total[row - 2 * pair]
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


def table(
    first: int,
    count: int,
    *,
    rank: int,
    scale: float,
    param_id: int,
    direction_words: Sequence[int],
    iteration: int,
    key: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """Rows of a factor in some directions, each element times ``scale``.

    Returns:
        float32 of shape [directions, rank, count].
    """
    out = torch.empty(len(direction_words), rank, count, device=device)
    c1, c3 = words_of((param_id << 8, iteration))
    directions = np.asarray(direction_words, np.uint32)
    split_over_threads(
        _table_kernel(),
        len(direction_words),
        out.numpy(),
        first,
        rank,
        f32(scale),
        directions,
        c1,
        c3,
        words_of(key),
        at_least=max(_MIN_PER_THREAD // max(rank * count, 1), 1),
    )
    return out


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    tile: Tile,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    sigma: float,
) -> None:
    """Perturbs a tile; the factors are of shape [rank, rows] and [rank, columns]."""
    split_over_threads(
        _perturb_kernel(FORMATS[source.dtype], FORMATS[target.dtype]),
        tile.rows,
        stored(source),
        stored(target),
        tile.offset,
        tile.pitch,
        left.numpy(),
        right.numpy(),
        f32(sigma),
        at_least=max(_MIN_PER_THREAD // tile.columns, 1),
    )


def accumulate(
    master: torch.Tensor,
    tile: Tile,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    index: int,
    width: int,
    param_id: int,
    iteration: int,
    key: tuple[int, int],
) -> None:
    """Updates a tile; the factors are of shape [terms, rows] and [terms, columns]."""
    split_over_threads(
        _accumulate_kernel(FORMATS[master.dtype]),
        -(-tile.rows // 2),
        stored(master),
        tile.offset,
        tile.pitch,
        left.numpy(),
        right.numpy(),
        (index, width),
        words_of((param_id << 8, iteration)),
        words_of(key),
        at_least=max(_MIN_PER_THREAD // (2 * tile.columns), 1),
    )
