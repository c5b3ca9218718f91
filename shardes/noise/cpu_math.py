"""The pieces of the CPU kernels: Philox, Box-Muller and the storage formats, compiled by numba.

Tensors are passed as the bits they are stored in (uint32 or uint16) and converted here, because numba knows
neither bfloat16 nor float16 on a CPU. float32 is computed without fast-math: the compiler may use vector
instructions but may not change a bit.
"""

import numba as nb
import numpy as np
import torch

from shardes.noise.definition import (
    COS_TURNS,
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
from shardes.noise.vectors import use_widest_vectors

use_widest_vectors()

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32

# How an element is stored; compile-time constants of the kernels.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}

_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (f32(-2 * c) for c in LOG_TAIL)
_S0, _S1, _S2, _S3 = (f32(c) for c in SIN_TURNS)
_C0, _C1, _C2, _C3 = (f32(c) for c in COS_TURNS)
_M0, _M1, _W0, _W1 = u64(PHILOX_M0), u64(PHILOX_M1), u32(PHILOX_W0), u32(PHILOX_W1)
_LN2_HI, _LN2_LO = f32(-2 * LN2_HI), f32(-2 * LN2_LO)


@nb.njit
def as_float(bits):
    """Return the float32 that 32 bits are."""
    return u32(bits).view(f32)


@nb.njit
def as_bits(value):
    """Return the 32 bits of a float32."""
    return f32(value).view(u32)


@nb.njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Compute the four words of a call of Philox4x32-10."""
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
def radius(bits):
    """Compute the Box-Muller radius of a random word."""
    # The definition's steps with two exact scalings folded away: u times 2**31, and the log's factor -2.
    scaled_u = f32(i32(bits >> u32(1))) + f32(0.5)
    pattern = i32(as_bits(scaled_u)) - i32(31 << 23)
    exponent = i32(pattern - i32(SQRT_HALF_BITS)) >> i32(23)
    z = as_float(pattern - i32(exponent << i32(23))) - f32(1)
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
def cos_sin(bits):
    """Compute cosine and sine of a random word's angle."""
    # The quadrant is in the two top bits of the shifted angle; signs are flipped by exclusive or.
    shifted = u32(bits + u32(0x20000000))
    turns = f32(i32(bits - u32(shifted & u32(0xC0000000)))) * f32(2.0**-32)
    square = turns * turns
    sine = turns * (((_S3 * square + _S2) * square + _S1) * square + _S0)
    cosine = square * (((_C3 * square + _C2) * square + _C1) * square + _C0) + f32(1)
    odd = (shifted & u32(0x40000000)) != u32(0)
    real = as_bits(sine if odd else cosine)
    imaginary = as_bits(cosine if odd else sine)
    real ^= u32(shifted + u32(0x40000000)) & u32(0x80000000)
    imaginary ^= shifted & u32(0x80000000)
    return as_float(real), as_float(imaginary)


@nb.njit(inline="always")
def four_normals(call, c1, c2, c3, k0, k1):
    """Compute the normals of one call, one for each quarter of a block."""
    a, b, c, d = philox(call, c1, c2, c3, k0, k1)
    radius0, radius1 = radius(a), radius(c)
    cosine0, sine0 = cos_sin(b)
    cosine1, sine1 = cos_sin(d)
    return radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1


@nb.njit(inline="always")
def eight_normals(call0, direction0, call1, direction1, c1, c3, k0, k1):
    """Compute the normals of two calls, four and four.

    The two are interleaved: with twice as many independent operations in flight it is a tenth faster.
    """
    a, b, c, d = philox(call0, c1, direction0, c3, k0, k1)
    e, f, g, h = philox(call1, c1, direction1, c3, k0, k1)
    radius0, radius1, radius2, radius3 = radius(a), radius(c), radius(e), radius(g)
    cosine0, sine0 = cos_sin(b)
    cosine1, sine1 = cos_sin(d)
    cosine2, sine2 = cos_sin(f)
    cosine3, sine3 = cos_sin(h)
    first = radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1
    second = radius2 * cosine2, radius2 * sine2, radius3 * cosine3, radius3 * sine3
    return first, second


@nb.njit(inline="always")
def load(bits, fmt):
    """Return the float32 value of stored bits."""
    if fmt == FLOAT32:
        return as_float(bits)
    if fmt == BFLOAT16:
        return as_float(u32(bits) << u32(16))
    # float16: shift exponent and mantissa into place; the multiplication rebiases, exactly, subnormals too.
    magnitude = u32((u32(bits) & u32(0x7FFF)) << u32(13))
    finite = as_bits(as_float(magnitude) * f32(2.0**112))
    unsigned = u32(magnitude | u32(0x7F800000)) if magnitude >= u32(0x0F800000) else finite
    return as_float(unsigned | u32((u32(bits) & u32(0x8000)) << u32(16)))


@nb.njit(inline="always")
def store(value, fmt):
    """Return the stored bits nearest to a float32, ties to even."""
    pattern = as_bits(value)
    if fmt == FLOAT32:
        return pattern
    sign = u32(pattern & u32(0x80000000))
    magnitude = u32(pattern ^ sign)
    if fmt == BFLOAT16:
        rounded = u32(pattern + u32(0x7FFF) + ((pattern >> u32(16)) & u32(1))) >> u32(16)
        return u32(0x7FC0) if magnitude > u32(0x7F800000) else rounded
    # float16. Below 2**-14, adding 0.5 lets the float32 adder round to the subnormals' step of 2**-24.
    small = u32(as_bits(as_float(magnitude) + f32(0.5)) - u32(0x3F000000))
    normal = u32(magnitude + u32(0xC8000FFF) + ((magnitude >> u32(13)) & u32(1))) >> u32(13)
    half = small if magnitude < u32(0x38800000) else normal
    half = u32(0x7C00) if magnitude >= u32(0x477FF000) else half
    half = u32(0x7E00) if magnitude > u32(0x7F800000) else half
    return u32(half | (sign >> u32(16)))


@nb.njit(inline="always")
def store_randomly(value, bits, fmt):
    """Round stochastically with 16 random bits, as in definition.py; not for float32."""
    pattern = as_bits(value)
    magnitude = u32(pattern & u32(0x7FFFFFFF))
    sign = u32(u32(pattern >> u32(16)) & u32(0x8000))
    if fmt == BFLOAT16:
        rounded = min(u32(u32(magnitude + bits) >> u32(16)), u32(0x7F7F))
        rounded = u32(0x7F80) if magnitude >= u32(0x7F800000) else rounded
        rounded = u32(0x7FC0) if magnitude > u32(0x7F800000) else rounded
        return u32(rounded | sign)
    is_small = magnitude < u32(0x38800000)
    steps = as_float(magnitude if is_small else u32(0)) * f32(2.0**40)
    small = u32(u32(i32(steps)) + bits) >> u32(16)
    normal = u32(u32(magnitude - u32(0x38000000)) + u32(bits >> u32(3))) >> u32(13)
    rounded = u32(small) if is_small else min(u32(normal), u32(0x7BFF))
    rounded = u32(0x7C00) if magnitude >= u32(0x7F800000) else rounded
    rounded = u32(0x7E00) if magnitude > u32(0x7F800000) else rounded
    return u32(rounded | sign)
