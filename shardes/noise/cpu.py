"""CPU kernels of the noise, compiled by numba: the bits of definition.py at the speed of the vector unit.

Every kernel walks over the blocks that a run touches, fills a block-sized scratch with normals, and combines
the owned part of it with the tensors. float32 is computed without fast-math, so neither vector width nor the
number of threads changes a bit. Tensors are passed as the bits they are stored in (uint32 or uint16) and
converted here, because numba knows neither bfloat16 nor float16 on a CPU.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba as nb
import numpy as np
import torch
from numpy.typing import NDArray

from shardes.noise.definition import (
    BLOCK,
    COS_TURNS,
    LANES,
    LN2_HI,
    LN2_LO,
    LOG_TAIL,
    PHILOX_M0,
    PHILOX_M1,
    PHILOX_ROUNDS,
    PHILOX_W0,
    PHILOX_W1,
    SIN_TURNS,
    SQRT_HALF_BITS,
)

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32

# How an element is stored; compile-time constants of the kernels.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
_FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

# Less work than this is not worth a hand-over to another thread (about 30 microseconds).
_MIN_BLOCKS_PER_THREAD = 512

_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (f32(-2 * c) for c in LOG_TAIL)
_S0, _S1, _S2, _S3 = (f32(c) for c in SIN_TURNS)
_C0, _C1, _C2, _C3 = (f32(c) for c in COS_TURNS)
_M0, _M1, _W0, _W1 = u64(PHILOX_M0), u64(PHILOX_M1), u32(PHILOX_W0), u32(PHILOX_W1)
_LN2_HI, _LN2_LO = f32(-2 * LN2_HI), f32(-2 * LN2_LO)


@nb.njit
def _as_float(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return u32(bits).view(f32)


@nb.njit
def _as_bits(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return f32(value).view(u32)


@nb.njit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for _ in range(PHILOX_ROUNDS):
        product0 = u64(c0) * _M0
        product1 = u64(c2) * _M1
        c0 = u32(product1 >> u64(32)) ^ c1 ^ k0
        c2 = u32(product0 >> u64(32)) ^ c3 ^ k1
        c1 = u32(product1)
        c3 = u32(product0)
        k0 = u32(k0 + _W0)
        k1 = u32(k1 + _W1)
    return c0, c1, c2, c3


@nb.njit(inline="always")
def _radius(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # The definition's steps with two exact scalings folded away: u times 2**31, and the factor -2 of the log.
    scaled_u = f32(i32(bits >> u32(1))) + f32(0.5)
    pattern = i32(_as_bits(scaled_u)) - i32(31 << 23)
    exponent = i32(pattern - i32(SQRT_HALF_BITS)) >> i32(23)
    z = _as_float(pattern - i32(exponent << i32(23))) - f32(1)
    tail = _L7 * z + _L6
    tail = tail * z + _L5
    tail = tail * z + _L4
    tail = tail * z + _L3
    tail = tail * z + _L2
    tail = tail * z + _L1
    tail = tail * z + _L0
    square = z * z
    e = f32(exponent)
    small = (square * z) * tail + e * _LN2_LO
    return np.sqrt(((small + square) - (z + z)) + e * _LN2_HI)


@nb.njit(inline="always")
def _cos_sin(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # The quadrant is in the two top bits of the shifted angle; signs are flipped by exclusive or.
    shifted = u32(bits + u32(0x20000000))
    turns = f32(i32(bits - u32(shifted & u32(0xC0000000)))) * f32(2.0**-32)
    square = turns * turns
    sine = turns * (((_S3 * square + _S2) * square + _S1) * square + _S0)
    cosine = square * (((_C3 * square + _C2) * square + _C1) * square + _C0) + f32(1)
    odd = (shifted & u32(0x40000000)) != u32(0)
    real = _as_bits(sine if odd else cosine)
    imaginary = _as_bits(cosine if odd else sine)
    real ^= u32(shifted + u32(0x40000000)) & u32(0x80000000)
    imaginary ^= shifted & u32(0x80000000)
    return _as_float(real), _as_float(imaginary)


@nb.njit(inline="always")
def _four_normals(lane, first_call, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    a, b, c, d = _philox(u32(u32(first_call) + u32(lane)), c1, c2, c3, k0, k1)
    radius0, radius1 = _radius(a), _radius(c)
    cosine0, sine0 = _cos_sin(b)
    cosine1, sine1 = _cos_sin(d)
    return radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1


@nb.njit(inline="always")
def _load(bits, fmt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The float32 value of stored bits."""
    if fmt == FLOAT32:
        return _as_float(bits)
    if fmt == BFLOAT16:
        return _as_float(u32(bits) << u32(16))
    # float16: shift exponent and mantissa into place; the multiplication rebiases, exactly, subnormals too.
    magnitude = u32((u32(bits) & u32(0x7FFF)) << u32(13))
    finite = _as_bits(_as_float(magnitude) * f32(2.0**112))
    unsigned = u32(magnitude | u32(0x7F800000)) if magnitude >= u32(0x0F800000) else finite
    return _as_float(unsigned | u32((u32(bits) & u32(0x8000)) << u32(16)))


@nb.njit(inline="always")
def _store(value, fmt):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The stored bits nearest to a float32, ties to even."""
    pattern = _as_bits(value)
    if fmt == FLOAT32:
        return pattern
    sign = u32(pattern & u32(0x80000000))
    magnitude = u32(pattern ^ sign)
    if fmt == BFLOAT16:
        rounded = u32(pattern + u32(0x7FFF) + ((pattern >> u32(16)) & u32(1))) >> u32(16)
        return u32(0x7FC0) if magnitude > u32(0x7F800000) else rounded
    # float16. Below 2**-14, adding 0.5 lets the float32 adder round to the subnormals' step of 2**-24.
    small = u32(_as_bits(_as_float(magnitude) + f32(0.5)) - u32(0x3F000000))
    normal = u32(magnitude + u32(0xC8000FFF) + ((magnitude >> u32(13)) & u32(1))) >> u32(13)
    half = small if magnitude < u32(0x38800000) else normal
    half = u32(0x7C00) if magnitude >= u32(0x477FF000) else half
    half = u32(0x7E00) if magnitude > u32(0x7F800000) else half
    return u32(half | (sign >> u32(16)))


@functools.cache
def _perturb_kernel(source_format: int, target_format: int) -> Callable[..., None]:
    """The kernel for one pair of formats; compiled when first used, then kept on disk by numba."""

    @nb.njit(nogil=True, cache=True, error_model="numpy")
    def perturb(first, last, source, target, start, sigma, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        eps = np.empty(BLOCK, np.float32)
        for block in range(first, last):
            first_call = u64(block) * u64(LANES)
            word1 = u32(c1 | u32(first_call >> u64(32)))
            for lane in range(LANES):
                a, b, c, d = _four_normals(lane, first_call, word1, c2, c3, k0, k1)
                eps[lane], eps[LANES + lane] = a, b
                eps[2 * LANES + lane], eps[3 * LANES + lane] = c, d
            low, high = max(block * BLOCK, start), min(block * BLOCK + BLOCK, start + source.size)
            here, there = source[low - start : high - start], target[low - start : high - start]
            owned = eps[low - block * BLOCK :]
            for j in range(here.size):
                centre = _load(_store(_load(here[j], source_format), target_format), target_format)
                there[j] = _store(centre + sigma * owned[j], target_format)

    return perturb


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _accumulate_kernel(first, last, master, start, coefficients, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    total = np.empty(BLOCK, np.float32)
    for block in range(first, last):
        total[:] = f32(0)
        first_call = u64(block) * u64(LANES)
        word1 = u32(c1 | u32(first_call >> u64(32)))
        for n in range(c2.size):
            word2, coefficient = c2[n], coefficients[n]
            for lane in range(LANES):
                a, b, c, d = _four_normals(lane, first_call, word1, word2, c3, k0, k1)
                total[lane] += coefficient * a
                total[LANES + lane] += coefficient * b
                total[2 * LANES + lane] += coefficient * c
                total[3 * LANES + lane] += coefficient * d
        low, high = max(block * BLOCK, start), min(block * BLOCK + BLOCK, start + master.size)
        here, owned = master[low - start : high - start], total[low - block * BLOCK :]
        for j in range(here.size):
            here[j] += owned[j]


def _bits(tensor: torch.Tensor) -> NDArray[np.uint32] | NDArray[np.uint16]:
    """The storage of a flat CPU tensor as unsigned integers of its element size; no copy."""
    width = torch.uint32 if tensor.dtype == torch.float32 else torch.uint16
    return tensor.detach().view(width).numpy()


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="noise")


def _over_blocks(kernel: Callable[..., None], start: int, length: int, *arguments: Any) -> None:
    """Runs a kernel over the blocks of [start, start + length), on as many threads as torch uses."""
    first, last = start // BLOCK, -(-(start + length) // BLOCK)
    num_threads = min(torch.get_num_threads(), (last - first) // _MIN_BLOCKS_PER_THREAD)
    if num_threads < 2:
        kernel(first, last, *arguments)
        return
    bounds = [first + (last - first) * i // num_threads for i in range(num_threads + 1)]
    pending = [
        _pool(num_threads).submit(kernel, low, high, *arguments) for low, high in itertools.pairwise(bounds)
    ]
    for future in pending:
        future.result()


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    start: int,
    sigma: float,
    words: tuple[int, int, int],
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.perturb``; ``words`` are the counter words 1 to 3."""
    kernel = _perturb_kernel(_FORMATS[source.dtype], _FORMATS[target.dtype])
    _over_blocks(
        kernel,
        start,
        source.numel(),
        _bits(source),
        _bits(target),
        start,
        f32(sigma),
        *(u32(word) for word in (*words, *key)),
    )


def accumulate(
    master: torch.Tensor,
    *,
    start: int,
    coefficients: Sequence[float],
    word1: int,
    direction_words: Sequence[int],
    word3: int,
    key: tuple[int, int],
) -> None:
    """As ``shardes.noise.accumulate``; the words are those of the counter."""
    _over_blocks(
        _accumulate_kernel,
        start,
        master.numel(),
        master.detach().numpy(),
        start,
        np.asarray(coefficients, np.float32),
        u32(word1),
        np.asarray(direction_words, np.uint32),
        u32(word3),
        *(u32(word) for word in key),
    )
