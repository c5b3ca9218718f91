"""The pieces of the GPU kernels: Philox, Box-Muller and the storage formats, in Triton.

What is left to the hardware are integer operations and IEEE additions, multiplications, square roots and
conversions, each rounded by itself: kernels that use these must be compiled with ``enable_fp_fusion=False``.
Conversions to bfloat16 are spelt out on integers, because Triton's own differ between devices and are wrong
in its interpreter.

Only builtins of ``tl`` are used, none of the functions that Triton itself writes in Triton (``tl.sum``,
``tl.zeros``): those belong to the compiler or to the interpreter from the moment that Triton is imported.
"""

from shardes.errors import UserError
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

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError(
        "the package triton is not installed, and the noise on a CUDA device needs it; CUDA builds of torch "
        "for Linux bring it along: install one of them (https://pytorch.org), or run: pip install triton"
    ) from error

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
_M0, _M1, _W0, _W1 = (tl.constexpr(c) for c in (PHILOX_M0, PHILOX_M1, PHILOX_W0, PHILOX_W1))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(-2 * c) for c in LOG_TAIL)
_LN2_HI, _LN2_LO = (tl.constexpr(-2 * c * 2.0**-23) for c in (LN2_HI, LN2_LO))
_SQRT_HALF_BITS = tl.constexpr(SQRT_HALF_BITS)
_SCALED_SQRT_HALF_BITS = tl.constexpr(SQRT_HALF_BITS + (31 << 23))  # of 2**31 * sqrt(1/2)
_S0, _S1, _S2, _S3 = (tl.constexpr(c) for c in SIN_TURNS)
_C0, _C1, _C2, _C3 = (tl.constexpr(c) for c in COS_TURNS)


@triton.jit
def as_float(bits):
    """Return the float32 that 32 bits are."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(value):
    """Return the 32 bits of a float32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Compute the four words of a call of Philox4x32-10."""
    for _ in tl.static_range(_ROUNDS):
        # One 64-bit product is one instruction; its halves taken apart (tl.umulhi) would be two.
        product0 = c0.to(tl.uint64) * _M0
        product1 = c2.to(tl.uint64) * _M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def radius(bits):
    """Compute the Box-Muller radius of a random word."""
    # The definition's steps with three exact scalings folded away: u times 2**31, the exponent times 2**23
    # (where it lies in a float32, so that it need not be shifted down), and the log's factor -2.
    scaled_u = (bits >> 1).to(tl.int32, bitcast=True).to(tl.float32) + 0.5
    distance = as_bits(scaled_u) - _SCALED_SQRT_HALF_BITS
    z = as_float((distance & 0x007FFFFF) + _SQRT_HALF_BITS) - 1.0
    e = (distance & 0xFF800000).to(tl.int32, bitcast=True).to(tl.float32)
    tail = _L7 * z + _L6
    tail = tail * z + _L5
    tail = tail * z + _L4
    tail = tail * z + _L3
    tail = tail * z + _L2
    tail = tail * z + _L1
    tail = tail * z + _L0
    square = z * z
    small = (square * z) * tail + e * _LN2_LO
    return tl.sqrt_rn(((small + square) - (z + z)) + e * _LN2_HI)


@triton.jit
def cos_sin(bits):
    """Compute cosine and sine of a random word's angle."""
    # The low 30 bits, read as signed, are the angle from the nearest quarter turn; here times 4, exactly.
    turns = (bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-34
    square = turns * turns
    sine = turns * (((_S3 * square + _S2) * square + _S1) * square + _S0)
    cosine = square * (((_C3 * square + _C2) * square + _C1) * square + _C0) + 1.0
    # The quadrant is in the two top bits of the shifted angle; signs are flipped by exclusive or.
    shifted = bits + 0x20000000
    odd = (shifted & 0x40000000) != 0
    real = as_bits(tl.where(odd, sine, cosine)) ^ ((shifted + 0x40000000) & 0x80000000)
    imaginary = as_bits(tl.where(odd, cosine, sine)) ^ (shifted & 0x80000000)
    return as_float(real), as_float(imaginary)


@triton.jit
def four_normals(call, c1, c2, c3, k0, k1):
    """Compute the normals of each call, one for each quarter of a block."""
    a, b, c, d = philox(call, c1, c2, c3, k0, k1)
    radius0 = radius(a)
    radius1 = radius(c)
    cosine0, sine0 = cos_sin(b)
    cosine1, sine1 = cos_sin(d)
    return radius0 * cosine0, radius0 * sine0, radius1 * cosine1, radius1 * sine1


@triton.jit
def widen(values):
    """Return the float32 values of stored elements."""
    if values.dtype == tl.bfloat16:
        values = as_float(values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    return values.to(tl.float32)


@triton.jit
def _to_bfloat16(values):
    """Return the bits of bfloat16 nearest to float32 values, ties to even; any bits for a NaN."""
    pattern = as_bits(values)
    return (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16


@triton.jit
def perturbed(source, step, dtype: tl.constexpr):
    """Return ``source`` rounded to the format ``dtype``, plus ``step``, rounded to it again."""
    x = widen(source)
    if dtype == tl.bfloat16:
        centre = x
        if source.dtype != tl.bfloat16:
            centre = as_float(_to_bfloat16(x) << 16)
        moved = centre + step
        # One test, for a NaN that either rounding would take for a number.
        bits = tl.where((x != x) | (moved != moved), 0x7FC0, _to_bfloat16(moved))
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = (x.to(dtype).to(tl.float32) + step).to(dtype)
    return result


@triton.jit
def round_randomly(values, bits, dtype: tl.constexpr):
    """Round float32 stochastically with 16 random bits each, as definition.py does; not to float32."""
    pattern = as_bits(values)
    magnitude = pattern & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = tl.minimum((magnitude + bits) >> 16, 0x7F7F)
        rounded = tl.where(magnitude >= 0x7F800000, 0x7F80, rounded)
        rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        is_small = magnitude < 0x38800000
        steps = as_float(tl.where(is_small, magnitude, 0)) * 2.0**40
        small = (steps.to(tl.int32).to(tl.uint32, bitcast=True) + bits) >> 16
        normal = tl.minimum((magnitude - 0x38000000 + (bits >> 3)) >> 13, 0x7BFF)
        rounded = tl.where(is_small, small, normal)
        rounded = tl.where(magnitude >= 0x7F800000, 0x7C00, rounded)
        rounded = tl.where(magnitude > 0x7F800000, 0x7E00, rounded)
    return (rounded | ((pattern >> 16) & 0x8000)).to(tl.uint16).to(dtype, bitcast=True)
