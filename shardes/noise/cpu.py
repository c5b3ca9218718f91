"""CPU kernels of the noise, compiled by numba: the bits of definition.py at the speed of the vector unit.

Every kernel walks over the blocks that a region's rows touch, fills a block-sized scratch with noise, and
combines the owned part of it with the tensors. Neither vector width nor the number of threads changes a bit.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from shardes.noise import cpu_math, definition
from shardes.noise.cpu_math import (
    FLOAT32,
    FORMATS,
    as_bits,
    as_float,
    eight_normals,
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
from shardes.utils.threads import split_over_threads

# Elements of normals that a kernel makes in a step: a pair of blocks to perturb with, a block to add up.
PAIR = 2 * BLOCK
_MIN_PER_THREAD = 1 << 15  # elements; see split_over_threads
# numba keeps compiled kernels by the date of this file and by the values in their closures. What they are
# made of in other files has to be among these. A compiled function must not, for numba takes it for another
# one in every process, and compiles for seconds each time.
_OTHER_FILES = (cpu_math, definition)
_SOURCES = zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in _OTHER_FILES))


@nb.njit(inline="always")
def fill_normals(eps, first_call, scale, c1, c2, c3, k0, k1):
    """eps[:128] = scale * the normals of a pair of blocks."""
    for lane in range(LANES):
        call = u32(u32(first_call) + u32(lane))
        first, second = eight_normals(call, c2, u32(call + u32(LANES)), c2, c1, c3, k0, k1)
        a, b, c, d = first
        e, f, g, h = second
        eps[lane], eps[LANES + lane] = scale * a, scale * b
        eps[2 * LANES + lane], eps[3 * LANES + lane] = scale * c, scale * d
        eps[4 * LANES + lane], eps[5 * LANES + lane] = scale * e, scale * f
        eps[6 * LANES + lane], eps[7 * LANES + lane] = scale * g, scale * h


@nb.njit(inline="always")
def _add_normals(total, first_call, coefficients, c1, directions, c3, k0, k1):
    """Adds the normals of a block in all directions, each times its coefficient, to total[:64]."""
    num_paired = directions.size - directions.size % 2
    for n in range(0, num_paired, 2):
        # Read here, not in the loop below: what is read there might, for all the compiler knows, be written.
        scale0, scale1 = coefficients[n], coefficients[n + 1]
        word20, word21 = directions[n], directions[n + 1]
        for lane in range(LANES):
            call = u32(u32(first_call) + u32(lane))
            first, second = eight_normals(call, word20, call, word21, c1, c3, k0, k1)
            a, b, c, d = first
            e, f, g, h = second
            total[lane] = (total[lane] + scale0 * a) + scale1 * e
            total[LANES + lane] = (total[LANES + lane] + scale0 * b) + scale1 * f
            total[2 * LANES + lane] = (total[2 * LANES + lane] + scale0 * c) + scale1 * g
            total[3 * LANES + lane] = (total[3 * LANES + lane] + scale0 * d) + scale1 * h
    for n in range(num_paired, directions.size):
        scale0, word20 = coefficients[n], directions[n]
        for lane in range(LANES):
            call = u32(u32(first_call) + u32(lane))
            a, b, c, d = four_normals(call, c1, word20, c3, k0, k1)
            total[lane] += scale0 * a
            total[LANES + lane] += scale0 * b
            total[2 * LANES + lane] += scale0 * c
            total[3 * LANES + lane] += scale0 * d


@nb.njit(inline="always")
def _fill_signs(eps, first_call, scale, c1, c2, c3, k0, k1):
    """eps[:2048] = scale * the signs of a block."""
    eps[:] = f32(0)
    _add_signs_of_one(eps, first_call, scale, c1, c2, c3, k0, k1)


@nb.njit(inline="always")
def _add_signs(total, first_call, coefficients, c1, directions, c3, k0, k1):
    """Adds the signs of a block in all directions, each times its coefficient, to total[:2048]."""
    for n in range(directions.size):
        _add_signs_of_one(total, first_call, coefficients[n], c1, directions[n], c3, k0, k1)


@nb.njit(inline="always")
def _add_signs_of_one(total, first_call, scale, c1, c2, c3, k0, k1):
    words = np.empty((4, LANES), np.uint32)
    for lane in range(LANES):
        a, b, c, d = philox(u32(u32(first_call) + u32(lane)), c1, c2, c3, k0, k1)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = a, b, c, d
    # Four bits of four words in a step: the compiler checks once a step that the arrays do not overlap.
    for first_bit in range(0, 32, 4):
        for lane in range(LANES):
            for word in range(4):
                for bit in range(4):
                    sign = u32(words[word, lane] << u32(31 - first_bit - bit)) & u32(0x80000000)
                    total[(word * 32 + first_bit + bit) * LANES + lane] += as_float(as_bits(scale) ^ sign)


@nb.njit(inline="always")
def fill_rounding_bits(bits, block, c1, c3, k0, k1):
    """bits[:64] = the random bits with which a block is rounded."""
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        call = u32(u32(first_call) + u32(lane))
        a, b, c, d = philox(call, word1, u32(Stream.ROUNDING), c3, k0, k1)
        bits[lane], bits[LANES + lane] = a >> u32(16), b >> u32(16)
        bits[2 * LANES + lane], bits[3 * LANES + lane] = c >> u32(16), d >> u32(16)


@nb.njit(inline="always")
def _place(step, size, per_row, start, stride, length):
    """What a step handles: where its block starts, and the stretch of it that the row owns, perhaps empty.

    Returns:
        The block's first element, the stretch counted from there, and what to add to an index counted from
        there to get the one within the tensor.
    """
    row, block_in_row = step // per_row, step % per_row
    row_start = start + row * stride
    block_start = (row_start // size + block_in_row) * size
    begin = max(row_start - block_start, 0)
    end = max(min(row_start + length - block_start, size), begin)
    return block_start, begin, end, row * length + block_start - row_start


@functools.cache
def _perturb_kernel(kind: NoiseKind, source_format: int, target_format: int) -> Callable[..., None]:
    """The kernel for one kind and pair of formats; compiled when first used, then kept on disk by numba."""
    is_gaussian, (size, per_call), sources = kind is NoiseKind.GAUSSIAN, _FILLS[kind], _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def perturb(first, last, geometry, source, target, sigma, words, key):
        _ = sources
        eps = np.empty(size, np.float32)
        (per_row, start, stride, length), (c1, c2, c3), (k0, k1) = geometry, words, key
        for step in range(first, last):
            block_start, begin, end, offset = _place(step, size, per_row, start, stride, length)
            first_call = u64(block_start // per_call)
            word1 = u32(c1 | u32(first_call >> u64(32)))
            if is_gaussian:
                fill_normals(eps, first_call, sigma, word1, c2, c3, k0, k1)
            else:
                _fill_signs(eps, first_call, sigma, word1, c2, c3, k0, k1)
            here, there = source[begin + offset : end + offset], target[begin + offset : end + offset]
            owned = eps[begin:end]
            for j in range(here.size):
                centre = load(store(load(here[j], source_format), target_format), target_format)
                there[j] = store(centre + owned[j], target_format)

    return perturb


@functools.cache
def _accumulate_kernel(kind: NoiseKind, master_format: int) -> Callable[..., None]:
    """As ``_perturb_kernel``."""
    is_gaussian, (size, per_call), sources = kind is NoiseKind.GAUSSIAN, _SUMS[kind], _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def accumulate(first, last, geometry, master, coefficients, directions, words, key):
        _ = sources
        total, bits = np.empty(size, np.float32), np.empty(size, np.uint32)
        (per_row, start, stride, length), (c1, c3), (k0, k1) = geometry, words, key
        for step in range(first, last):
            block_start, begin, end, offset = _place(step, size, per_row, start, stride, length)
            first_call = u64(block_start // per_call)
            word1 = u32(c1 | u32(first_call >> u64(32)))
            total[:] = f32(0)
            if is_gaussian:
                _add_normals(total, first_call, coefficients, word1, directions, c3, k0, k1)
            else:
                _add_signs(total, first_call, coefficients, word1, directions, c3, k0, k1)
            here, owned = master[begin + offset : end + offset], total[begin:end]
            if master_format == FLOAT32:
                for j in range(here.size):
                    here[j] = as_bits(as_float(here[j]) + owned[j])
            else:
                for part in range(size // BLOCK):
                    block = block_start // BLOCK + part
                    fill_rounding_bits(bits[part * BLOCK :], block, c1, c3, k0, k1)
                drawn = bits[begin:end]
                for j in range(here.size):
                    moved = load(here[j], master_format) + owned[j]
                    here[j] = store_randomly(moved, drawn[j], master_format)

    return accumulate


@functools.cache
def _add_kernel(master_format: int) -> Callable[..., None]:
    """As ``_perturb_kernel``, for a narrow master."""
    sources = _SOURCES

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def add(first, last, geometry, master, delta, words, key):
        _ = sources
        bits = np.empty(BLOCK, np.uint32)
        (per_row, start, stride, length), (c1, c3), (k0, k1) = geometry, words, key
        for step in range(first, last):
            block_start, begin, end, offset = _place(step, BLOCK, per_row, start, stride, length)
            fill_rounding_bits(bits, block_start // BLOCK, c1, c3, k0, k1)
            here, there = master[begin + offset : end + offset], delta[begin + offset : end + offset]
            drawn = bits[begin:end]
            for j in range(here.size):
                moved = load(here[j], master_format) + as_float(there[j])
                here[j] = store_randomly(moved, drawn[j], master_format)

    return add


# How many elements of a kind are made at a time, and how many of them a call of Philox serves.
_FILLS = {NoiseKind.GAUSSIAN: (PAIR, 4), NoiseKind.RADEMACHER: (SIGN_BLOCK, 128)}
_SUMS = {NoiseKind.GAUSSIAN: (BLOCK, 4), NoiseKind.RADEMACHER: (SIGN_BLOCK, 128)}


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
    kernel, size = _perturb_kernel(kind, FORMATS[source.dtype], FORMATS[target.dtype]), _FILLS[kind][0]
    _over_blocks(
        kernel, region, size, stored(source), stored(target), f32(sigma), words_of(words), words_of(key)
    )


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
        _SUMS[kind][0],
        stored(master),
        np.asarray(coefficients, np.float32),
        np.asarray(direction_words, np.uint32),
        words_of((word1, word3)),
        words_of(key),
    )


def add(
    master: torch.Tensor,
    delta: torch.Tensor,
    region: Region,
    *,
    word1: int,
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.add``, for a bfloat16 or float16 master; the words are those of the counter."""
    kernel, words = _add_kernel(FORMATS[master.dtype]), words_of((word1, word3))
    _over_blocks(kernel, region, BLOCK, stored(master), stored(delta), words, words_of(key))


def words_of(numbers: Sequence[int]) -> tuple[np.uint32, ...]:
    """Numbers as the words that kernels take."""
    return tuple(u32(number) for number in numbers)


def _over_blocks(kernel: Callable[..., None], region: Region, size: int, *arguments: Any) -> None:
    """Runs a kernel over the blocks of ``size`` elements that each row may touch, on several threads."""
    start, stride, length = region.start, region.stride, region.length
    # With one row it is known; rows that start anywhere may touch one block more than they fill.
    per_row = (start % size + length - 1 if region.rows == 1 else length + size - 2) // size + 1
    split_over_threads(
        kernel,
        region.rows * per_row,
        (per_row, start, stride, length),
        *arguments,
        at_least=max(_MIN_PER_THREAD // size, 1),
    )


def stored(tensor: torch.Tensor) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """The storage of a contiguous CPU tensor as flat unsigned integers of its element size; no copy."""
    width = torch.uint32 if tensor.dtype == torch.float32 else torch.uint16
    return tensor.detach().view(-1).view(width).numpy()
