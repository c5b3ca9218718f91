"""Standard normal noise on a CPU, compiled by numba."""

import numba as nb

from shardes.noise.cpu import Fill, checksum
from shardes.noise.cpu_math import eight_normals, four_normals, u32
from shardes.noise.definition import BLOCK, LANES

# Elements of normals that are filled at a time: two blocks are faster than one, see eight_normals.
PAIR = 2 * BLOCK


@nb.njit(inline="always")
def fill_normals(eps, first_call, scale, c1, c2, c3, k0, k1):
    """Write scale times the normals of a pair of blocks to eps[:128]."""
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
    """Add the normals of a block in all directions, each times its coefficient, to total[:64]."""
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


FILL = Fill(
    fill=fill_normals,
    fill_size=PAIR,
    add=_add_normals,
    add_size=BLOCK,
    elements_per_call=4,
    sources=checksum(__file__),
)
