"""Rademacher noise on a CPU, compiled by numba."""

import numba as nb
import numpy as np

from shardes.noise.cpu import Fill, checksum
from shardes.noise.cpu_math import as_bits, as_float, f32, philox, u32
from shardes.noise.definition import LANES, SIGN_BLOCK


@nb.njit(inline="always")
def _fill_signs(eps, first_call, scale, c1, c2, c3, k0, k1):
    """Write scale times the signs of a block to eps[:2048]."""
    eps[:] = f32(0)
    _add_signs_of_one(eps, first_call, scale, c1, c2, c3, k0, k1)


@nb.njit(inline="always")
def _add_signs(total, first_call, coefficients, c1, directions, c3, k0, k1):
    """Add the signs of a block in all directions, each times its coefficient, to total[:2048]."""
    for n in range(directions.size):
        _add_signs_of_one(total, first_call, coefficients[n], c1, directions[n], c3, k0, k1)


@nb.njit(inline="always")
def _add_signs_of_one(total, first_call, scale, c1, c2, c3, k0, k1):
    """Add scale times the signs of a block in one direction to total[:2048]."""
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


FILL = Fill(
    fill=_fill_signs,
    fill_size=SIGN_BLOCK,
    add=_add_signs,
    add_size=SIGN_BLOCK,
    elements_per_call=128,
    sources=checksum(__file__),
)
