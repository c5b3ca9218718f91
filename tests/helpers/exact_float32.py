"""IEEE 754 binary32 in whole numbers: what each operation must give, from its definition alone.

A number is its 32 bits. Finite results are rounded to nearest, ties to even, with subnormals. No float
arithmetic of Python, NumPy or torch is involved, but for the powers of float64 that docs/updates.md asks for.
"""

import math
from fractions import Fraction

SIGN = 0x80000000
INFINITY = 0x7F800000


def value(bits):
    """Return a finite number as a fraction."""
    exponent, mantissa = bits >> 23 & 0xFF, bits & 0x7FFFFF
    assert exponent < 255, "not finite"
    mantissa, exponent = (mantissa | 0x800000, exponent) if exponent else (mantissa, 1)
    magnitude = Fraction(mantissa) * Fraction(2) ** (exponent - 150)
    return -magnitude if bits & SIGN else magnitude


def rounded(number, zero=0):
    """Return the bits nearest to a fraction; ``zero`` if it is exactly 0."""
    if number == 0:
        return zero
    magnitude, sign = abs(number), SIGN if number < 0 else 0
    # 2**exponent <= magnitude < 2**(exponent + 1)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = max(exponent, -126) - 23
    count = round(magnitude / Fraction(2) ** step)  # of Python's fractions: ties to even
    if step == -149:
        return sign | count  # subnormal, or the smallest normal number
    # A count of 2**24 carries into the exponent by itself.
    return sign | min(((step + 149) << 23) + count, INFINITY)


def bits_of(number):
    """Return the bits of the float32 number nearest to a Python float, which may be infinite in no case."""
    return rounded(Fraction(number), zero=SIGN if math.copysign(1, number) < 0 else 0)


def add(a, b):
    if value(a) == value(b) == 0:
        return a & b & SIGN
    return rounded(value(a) + value(b))


def subtract(a, b):
    return add(a, b ^ SIGN)


def multiply(a, b):
    return rounded(value(a) * value(b), zero=(a ^ b) & SIGN)


def divide(a, b):
    return rounded(value(a) / value(b), zero=(a ^ b) & SIGN)


def square_root(a):
    """Return the root of a number that is not negative, from the whole root of a large enough multiple."""
    if value(a) == 0:
        return a
    shift = 400  # 2**400 times the number is whole, and so is half of the exponent
    whole = value(a) * 2**shift
    assert whole.denominator == 1
    root = math.isqrt(whole.numerator)
    # What is left over decides that there is no tie; how much it is does not matter.
    rest = Fraction(1, 2) if root * root != whole.numerator else 0
    return rounded((root + rest) / Fraction(2) ** (shift // 2))
