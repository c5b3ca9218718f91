"""CPU kernels of noise that covers one part of the parameters, compiled by numba.

They walk over the blocks of one part alone, so that they read and write no others. In an update, each block
gets the noise of its part's directions.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardes.noise import parts as definition_of_parts
from shardes.noise.cpu import (
    MIN_PER_THREAD,
    Fill,
    add_block,
    checksum,
    compile_with,
    fill_block,
    fill_rounding_bits,
    stored,
    update_words,
    words_of,
)
from shardes.noise.cpu_math import (
    FLOAT32,
    FORMATS,
    as_bits,
    as_float,
    f32,
    load,
    philox,
    store,
    store_randomly,
    u32,
    u64,
)
from shardes.noise.definition import BLOCK, Floats, Ints, NoiseKey, Stream, seed_key
from shardes.noise.parts import Parts, part_of_direction
from shardes.noise.parts import prefetch as prefetching
from shardes.noise.parts.prefetch import LINE, prefetch
from shardes.noise.region import Region
from shardes.utils.compiling import compile_kernel
from shardes.utils.threads import split_over_threads

_SOURCES = checksum(__file__, definition_of_parts.__file__, prefetching.__file__)


@functools.cache
def _shift_kernel() -> Callable[..., None]:
    """Compile the kernel that computes by how much parts are shifted at its first call."""
    sources = _SOURCES

    @compile_kernel
    def shift(first, last, out, first_call, num_parts, words, key):
        _ = sources
        (c1, c3), (k0, k1) = words, key
        for step in range(first, last):
            a, b, c, d = philox(u32(first_call + step), c1, u32(Stream.PARTS), c3, k0, k1)
            out[4 * step] = u32(u64(a) * u64(num_parts) >> u64(32))
            out[4 * step + 1] = u32(u64(b) * u64(num_parts) >> u64(32))
            out[4 * step + 2] = u32(u64(c) * u64(num_parts) >> u64(32))
            out[4 * step + 3] = u32(u64(d) * u64(num_parts) >> u64(32))

    return shift


@nb.njit(inline="always")
def _row_of(step, geometry):
    """Return the row of a step, the row's first element, and the step's place in the row."""
    per_row, start, stride, _ = geometry
    row = step // per_row
    return row, start + row * stride, step - row * per_row


@nb.njit(inline="always")
def _owned(row_start, length, block_start, block):
    """Return the range of a block's elements that a row has."""
    return max(row_start - block_start, 0), min(row_start + length - block_start, block)


@nb.njit(inline="always")
def _block_of_part(row_start, place, shifts, part, block):
    """Return the first element of a part's block in a group, the ``place``-th that a row may touch."""
    (table, first_group), (chosen, num_parts) = shifts, part
    group = row_start // (num_parts * block) + place
    shift = np.int64(table[group - first_group])
    return (group * num_parts + (chosen + num_parts - shift) % num_parts) * block


@functools.cache
def perturb_kernel(fill: Fill, source_format: int, target_format: int) -> Callable[..., None]:
    """Compile the kernel for a kind and a pair of formats at its first call; numba keeps it on disk."""
    size, per_call, sources = fill.fill_size, fill.elements_per_call, _SOURCES ^ fill.sources

    def perturb(first, last, geometry, source, target, shifts, part, block, sigma, words, key):
        _ = sources
        eps = np.empty(size, np.float32)
        length, (c1, c2, c3), (k0, k1) = geometry[3], words, key
        for step in range(first, last):
            row, row_start, place = _row_of(step, geometry)
            block_start = _block_of_part(row_start, place, shifts, part, block)
            begin, end = _owned(row_start, length, block_start, block)
            if begin >= end:
                continue
            offset = row * length + block_start - row_start
            # The processor does not foresee the next block's memory: ask for it while this noise is made.
            next_row, next_start, next_place = _row_of(step + 1, geometry)
            ahead = next_row * length - next_start
            if step + 1 < last:
                ahead += _block_of_part(next_start, next_place, shifts, part, block)
            for low in range(begin // size * size, end, size):
                for line in range(low, low + size, LINE):
                    prefetch(source, ahead + line)
                    prefetch(target, ahead + line)
                first_call = u64((block_start + low) // per_call)
                fill_block(eps, first_call, sigma, u32(c1 | u32(first_call >> u64(32))), c2, c3, k0, k1)
                inner, outer = max(begin - low, 0), min(end - low, size)
                here = source[offset + low + inner : offset + low + outer]
                there = target[offset + low + inner : offset + low + outer]
                owned = eps[inner:outer]
                for j in range(here.size):
                    centre = load(store(load(here[j], source_format), target_format), target_format)
                    there[j] = store(centre + owned[j], target_format)

    return compile_with(perturb, fill_block=fill.fill)


@functools.cache
def _restore_kernel(source_format: int, target_format: int) -> Callable[..., None]:
    """Compile the kernel for a pair of formats at its first call; numba keeps it on disk."""
    sources = _SOURCES

    @compile_kernel
    def restore(first, last, geometry, source, target, shifts, part, block):
        _ = sources
        length = geometry[3]
        for step in range(first, last):
            row, row_start, place = _row_of(step, geometry)
            block_start = _block_of_part(row_start, place, shifts, part, block)
            begin, end = _owned(row_start, length, block_start, block)
            if begin >= end:
                continue
            offset = row * length + block_start - row_start
            here, there = source[begin + offset : end + offset], target[begin + offset : end + offset]
            for j in range(here.size):
                there[j] = store(load(here[j], source_format), target_format)

    return restore


@functools.cache
def accumulate_kernel(fill: Fill, master_format: int) -> Callable[..., None]:
    """Compile the kernel for a kind and a format at its first call; numba keeps it on disk."""
    size, per_call, sources = fill.add_size, fill.elements_per_call, _SOURCES ^ fill.sources

    def accumulate(first, last, geometry, master, shifts, num_parts, block, terms, words, key):
        _ = sources
        total, bits = np.empty(size, np.float32), np.empty(size, np.uint32)
        length, (c1, c3), (k0, k1) = geometry[3], words, key
        (table, first_group), (bounds, coefficients, directions) = shifts, terms
        for step in range(first, last):
            row, row_start, place = _row_of(step, geometry)
            number = row_start // block + place
            group = number // num_parts
            block_start, offset = number * block, row * length + number * block - row_start
            begin, end = _owned(row_start, length, block_start, block)
            if begin >= end:
                continue
            part = (number - group * num_parts + np.int64(table[group - first_group])) % num_parts
            scales = coefficients[bounds[part] : bounds[part + 1]]
            words2 = directions[bounds[part] : bounds[part + 1]]
            for low in range(begin // size * size, end, size):
                first_call = u64((block_start + low) // per_call)
                total[:] = f32(0)
                add_block(total, first_call, scales, u32(c1 | u32(first_call >> u64(32))), words2, c3, k0, k1)
                inner, outer = max(begin - low, 0), min(end - low, size)
                here, owned = master[offset + low + inner : offset + low + outer], total[inner:outer]
                if master_format == FLOAT32:
                    for j in range(here.size):
                        here[j] = as_bits(as_float(here[j]) + owned[j])
                else:
                    for piece in range(size // BLOCK):
                        of_block = (block_start + low) // BLOCK + piece
                        fill_rounding_bits(bits[piece * BLOCK :], of_block, c1, c3, k0, k1)
                    drawn = bits[inner:outer]
                    for j in range(here.size):
                        moved = load(here[j], master_format) + owned[j]
                        here[j] = store_randomly(moved, drawn[j], master_format)

    return compile_with(accumulate, add_block=fill.add)


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
    kernel = perturb_kernel(fill, FORMATS[source.dtype], FORMATS[target.dtype])
    words = words_of((region.param_id << 8, word2, key.iteration)), words_of(seed_key(key.seed))
    place = _shifts(parts, region, key), (part_of_direction(direction, parts.num), parts.num)
    _over_rows(
        kernel,
        region,
        parts.group,
        parts,
        stored(source),
        stored(target),
        *place,
        parts.block,
        f32(sigma),
        *words,
    )


def restore(
    source: Tensor, target: Tensor, region: Region, *, parts: Parts, key: NoiseKey, direction: int
) -> None:
    """Restore the elements of a direction's part as ``shardes.noise.restore`` does."""
    kernel = _restore_kernel(FORMATS[source.dtype], FORMATS[target.dtype])
    place = _shifts(parts, region, key), (part_of_direction(direction, parts.num), parts.num)
    _over_rows(kernel, region, parts.group, parts, stored(source), stored(target), *place, parts.block)


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
    kernel = accumulate_kernel(fill, FORMATS[master.dtype])
    terms = parts.by_part(coefficients, words2, directions)
    words, shifts = update_words(region.param_id, key), _shifts(parts, region, key)
    _over_rows(
        kernel, region, parts.block, parts, stored(master), shifts, parts.num, parts.block, terms, *words
    )


@functools.lru_cache(maxsize=4096)
def _shifts(parts: Parts, region: Region, key: NoiseKey) -> tuple[NDArray[np.uint32], int]:
    """Compute by how much parts are shifted in the groups that a region touches; kept for further members.

    Returns:
        Numbers below the number of parts, uint32, and the group that the first of them belongs to.
    """
    first, count = parts.groups(region.start, region.end)
    first_call = first // 4
    num_calls = -(-(first + count) // 4) - first_call
    out = np.empty(4 * num_calls, np.uint32)
    words = update_words(region.param_id, key)
    split_over_threads(
        _shift_kernel(), num_calls, out, first_call, parts.num, *words, at_least=MIN_PER_THREAD // 4
    )
    return out, 4 * first_call


def _over_rows(kernel: Callable[..., None], region: Region, size: int, parts: Parts, *arguments: Any) -> None:
    """Run a kernel over the groups or blocks of ``size`` elements that each row may touch."""
    per_row = parts.per_row(region, size)
    geometry = per_row, region.start, region.stride, region.length
    at_least = max(MIN_PER_THREAD // parts.block, 1)
    split_over_threads(kernel, region.rows * per_row, geometry, *arguments, at_least=at_least)
