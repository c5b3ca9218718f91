"""Standard normal noise on a GPU, in Triton."""

from shardes.noise.definition import BLOCK, LANES
from shardes.noise.gpu import CALLS, Fill, move_four, within
from shardes.noise.gpu_math import as_bits, as_float, four_normals, perturbed, tl, triton

_LANES = tl.constexpr(LANES)


@triton.jit
def _perturb_normals(source, target, sigma_bits, call, c1, c2, c3, k0, k1, low, high, bordered: tl.constexpr):
    """Perturb the four elements of each call; ``source`` and ``target`` point to the first of them."""
    dtype = target.dtype.element_ty
    sigma = as_float(sigma_bits)
    mask0 = within(0, low, high) if bordered else None
    mask1 = within(_LANES, low, high) if bordered else None
    mask2 = within(2 * _LANES, low, high) if bordered else None
    mask3 = within(3 * _LANES, low, high) if bordered else None
    # All loads come first: the long computation hides their latency.
    source0 = tl.load(source, mask=mask0)
    source1 = tl.load(source + _LANES, mask=mask1)
    source2 = tl.load(source + 2 * _LANES, mask=mask2)
    source3 = tl.load(source + 3 * _LANES, mask=mask3)
    eps0, eps1, eps2, eps3 = four_normals(call, c1, c2, c3, k0, k1)
    tl.store(target, perturbed(source0, sigma * eps0, dtype), mask=mask0)
    tl.store(target + _LANES, perturbed(source1, sigma * eps1, dtype), mask=mask1)
    tl.store(target + 2 * _LANES, perturbed(source2, sigma * eps2, dtype), mask=mask2)
    tl.store(target + 3 * _LANES, perturbed(source3, sigma * eps3, dtype), mask=mask3)


@triton.jit
def _accumulate_normals(master, table, num_directions, call, c1, c3, k0, k1, low, high):
    """Add weighted noise to the four elements of each call; ``master`` points to the first of them."""
    total0 = tl.full(call.shape, 0.0, tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for n in range(num_directions):
        coefficient = as_float(tl.load(table + n))
        c2 = as_bits(tl.load(table + num_directions + n))
        eps0, eps1, eps2, eps3 = four_normals(call, c1, c2, c3, k0, k1)
        total0 += coefficient * eps0
        total1 += coefficient * eps1
        total2 += coefficient * eps2
        total3 += coefficient * eps3
    move_four(master, total0, total1, total2, total3, call, c1, c3, k0, k1, low, high)


FILL = Fill(
    perturb_calls=_perturb_normals,
    accumulate_calls=_accumulate_normals,
    size=BLOCK,
    calls=CALLS,
    always_masked=False,
    part_chunk=8 * BLOCK,
)
