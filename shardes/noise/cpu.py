"""CPU kernels of elementwise noise, compiled by numba: the definition's bits at the vector unit's speed.

Every kernel walks over the blocks that a region's rows touch, has the kind of noise fill a block-sized
scratch, and combines the owned part of it with the tensors. Neither vector width nor the number of threads
changes a bit.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardes.noise import cpu_math, definition
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
from shardes.noise.definition import BLOCK, LANES, Floats, Ints, NoiseKey, Stream, seed_key
from shardes.noise.region import Region
from shardes.utils.compiling import compile_kernel
from shardes.utils.threads import split_over_threads

# Elements that are worth a thread; see split_over_threads.
MIN_PER_THREAD = 1 << 15


def checksum(*files: str | None) -> int:
    """Compute the CRC-32 of source files and of those that every kernel is made of.

    numba keeps compiled kernels by the date of the file that they are in and by the values in their closures.
    The code that they have from other files has to be among these values, and this number stands for it. A
    compiled function must not be, for numba takes it for another one in every process and compiles again.
    """
    every = (*files, __file__, cpu_math.__file__, definition.__file__)
    return zlib.crc32(b"".join(Path(str(file)).read_bytes() for file in every))


@dataclass(frozen=True)
class Fill:
    """Compiled functions with which a kind of noise computes whole blocks.

    Attributes:
        fill: ``fill(eps, first_call, scale, c1, c2, c3, k0, k1)`` writes scale times the noise to
            ``eps[:fill_size]``. ``first_call`` is the first Philox call, c1 to c3 are counter words, k0 and
            k1 the key.
        fill_size: Elements that ``fill`` writes.
        add: ``add(total, first_call, coefficients, c1, directions, c3, k0, k1)`` adds the noise of every
            direction times its coefficient to ``total[:add_size]``, in order; ``directions`` are counter
            words.
        add_size: Elements that ``add`` changes.
        elements_per_call: Elements that one Philox call serves.
        sources: ``checksum`` of the files that the functions are written in.
    """

    fill: Callable[..., None]
    fill_size: int
    add: Callable[..., None]
    add_size: int
    elements_per_call: int
    sources: int


def fill_block(eps, first_call, scale, c1, c2, c3, k0, k1):
    """Stand for ``Fill.fill`` until ``compile_with`` puts it in."""


def add_block(total, first_call, coefficients, c1, directions, c3, k0, k1):
    """Stand for ``Fill.add`` until ``compile_with`` puts it in."""


def compile_with(kernel: Any, **functions: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel with these functions in place of the globals of the same names.

    They are globals because numba must not see them in the closure, see ``checksum``.
    """
    bound = FunctionType(
        kernel.__code__, kernel.__globals__ | functions, kernel.__name__, None, kernel.__closure__
    )
    return compile_kernel(bound)


@nb.njit(inline="always")
def fill_rounding_bits(bits, block, c1, c3, k0, k1):
    """Write the random bits with which a block is rounded to bits[:64]."""
    first_call = u64(block) * u64(LANES)
    word1 = u32(c1 | u32(first_call >> u64(32)))
    for lane in range(LANES):
        call = u32(u32(first_call) + u32(lane))
        a, b, c, d = philox(call, word1, u32(Stream.ROUNDING), c3, k0, k1)
        bits[lane], bits[LANES + lane] = a >> u32(16), b >> u32(16)
        bits[2 * LANES + lane], bits[3 * LANES + lane] = c >> u32(16), d >> u32(16)


@nb.njit(inline="always")
def _place(step, size, per_row, start, stride, length):
    """Locate a step's block, and the elements of it that the row owns, perhaps none.

    Returns:
        The block's first element; begin and end of the owned elements, counted from there; and the number to
        add to an index counted from there to get the index within the tensor.
    """
    row, block_in_row = step // per_row, step % per_row
    row_start = start + row * stride
    block_start = (row_start // size + block_in_row) * size
    begin = max(row_start - block_start, 0)
    end = max(min(row_start + length - block_start, size), begin)
    return block_start, begin, end, row * length + block_start - row_start


@functools.cache
def perturb_kernel(fill: Fill, source_format: int, target_format: int) -> Callable[..., None]:
    """Compile the kernel for a kind and a pair of formats at its first call; numba keeps it on disk."""
    size, per_call, sources = fill.fill_size, fill.elements_per_call, fill.sources

    def perturb(first, last, geometry, source, target, sigma, words, key):
        _ = sources
        eps = np.empty(size, np.float32)
        (per_row, start, stride, length), (c1, c2, c3), (k0, k1) = geometry, words, key
        for step in range(first, last):
            block_start, begin, end, offset = _place(step, size, per_row, start, stride, length)
            first_call = u64(block_start // per_call)
            word1 = u32(c1 | u32(first_call >> u64(32)))
            fill_block(eps, first_call, sigma, word1, c2, c3, k0, k1)
            here, there = source[begin + offset : end + offset], target[begin + offset : end + offset]
            owned = eps[begin:end]
            for j in range(here.size):
                centre = load(store(load(here[j], source_format), target_format), target_format)
                there[j] = store(centre + owned[j], target_format)

    return compile_with(perturb, fill_block=fill.fill)


@functools.cache
def accumulate_kernel(fill: Fill, master_format: int) -> Callable[..., None]:
    """Compile the kernel for a kind and a format at its first call; numba keeps it on disk."""
    size, per_call, sources = fill.add_size, fill.elements_per_call, fill.sources

    def accumulate(first, last, geometry, master, coefficients, directions, words, key):
        _ = sources
        total, bits = np.empty(size, np.float32), np.empty(size, np.uint32)
        (per_row, start, stride, length), (c1, c3), (k0, k1) = geometry, words, key
        for step in range(first, last):
            block_start, begin, end, offset = _place(step, size, per_row, start, stride, length)
            first_call = u64(block_start // per_call)
            word1 = u32(c1 | u32(first_call >> u64(32)))
            total[:] = f32(0)
            add_block(total, first_call, coefficients, word1, directions, c3, k0, k1)
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

    return compile_with(accumulate, add_block=fill.add)


@functools.cache
def add_kernel(master_format: int) -> Callable[..., None]:
    """Compile the kernel for a bfloat16 or float16 master at its first call; numba keeps it on disk."""
    sources = checksum()

    @compile_kernel
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


def perturb(
    source: Tensor, target: Tensor, region: Region, *, fill: Fill, sigma: float, word2: int, key: NoiseKey
) -> None:
    """Perturb as ``shardes.noise.perturb`` does, with counter word 2 given."""
    kernel = perturb_kernel(fill, FORMATS[source.dtype], FORMATS[target.dtype])
    words = words_of((region.param_id << 8, word2, key.iteration))
    tensors = stored(source), stored(target)
    over_blocks(kernel, region, fill.fill_size, *tensors, f32(sigma), words, words_of(seed_key(key.seed)))


def accumulate(
    master: Tensor, region: Region, *, fill: Fill, coefficients: Floats, words2: Ints, key: NoiseKey
) -> None:
    """Accumulate as ``shardes.noise.accumulate`` does, with counter words 2 given."""
    kernel, words = accumulate_kernel(fill, FORMATS[master.dtype]), np.asarray(words2, np.uint32)
    terms = np.asarray(coefficients, np.float32), words
    over_blocks(kernel, region, fill.add_size, stored(master), *terms, *update_words(region.param_id, key))


def add(master: Tensor, delta: Tensor, region: Region, *, key: NoiseKey) -> None:
    """Add to a narrow master as ``shardes.noise.add`` does."""
    kernel, words = add_kernel(FORMATS[master.dtype]), update_words(region.param_id, key)
    over_blocks(kernel, region, BLOCK, stored(master), stored(delta), *words)


def update_words(param_id: int, key: NoiseKey) -> tuple[tuple[np.uint32, ...], tuple[np.uint32, ...]]:
    """Return the counter words 1 and 3 of an update, and the key words."""
    return words_of((param_id << 8, key.iteration)), words_of(seed_key(key.seed))


def words_of(numbers: Ints) -> tuple[np.uint32, ...]:
    """Return numbers as the uint32 words that kernels take."""
    return tuple(u32(number) for number in numbers)


def over_blocks(kernel: Callable[..., None], region: Region, size: int, *arguments: Any) -> None:
    """Run a kernel over the blocks of ``size`` elements that each row may touch, on several threads."""
    start, stride, length = region.start, region.stride, region.length
    # With one row it is known; rows that start anywhere may touch one block more than they fill.
    per_row = (start % size + length - 1 if region.rows == 1 else length + size - 2) // size + 1
    split_over_threads(
        kernel,
        region.rows * per_row,
        (per_row, start, stride, length),
        *arguments,
        at_least=max(MIN_PER_THREAD // size, 1),
    )


def stored(tensor: Tensor) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """Return the storage of a contiguous CPU tensor as flat uint32 or uint16, without a copy."""
    width = torch.uint32 if tensor.dtype == torch.float32 else torch.uint16
    return tensor.detach().view(-1).view(width).numpy()
