"""Float32 arithmetic with the same bits on every device: all that a step may be computed with.

IEEE 754 leaves one result to each addition, subtraction, multiplication, division and square root. torch
keeps to it in some of its operations only: its square root on CPUs is a library's that trades bits for speed;
``addcmul``, ``lerp`` and ``add`` with ``alpha`` fuse two operations on some devices; dividing by a number
multiplies by its reciprocal on others. docs/updates.md says why each operation of the list is exact.
"""

import numpy as np
import torch
from torch import Tensor

from shardes.errors import UserError

# The operators of torch that optimizers and decay may use: on float32 tensors of equal shapes, or on one of
# them and a number that is a float32 value. ``sqrt`` alone may use those of ``SQRT_OPERATIONS`` on float64.
EXACT_OPERATIONS = frozenset(
    {
        "aten.add.Tensor",  # without alpha
        "aten.add_.Tensor",
        "aten.sub.Tensor",
        "aten.sub_.Tensor",
        "aten.mul.Tensor",
        "aten.mul_.Tensor",
        "aten.div.Tensor",  # by a tensor, never by a number
        "aten.div_.Tensor",
        "aten.clone.default",
        "aten.copy_.default",
        "aten._to_copy.default",  # to a wider dtype, or from float64 in ``sqrt``
        "aten.empty.memory_format",
        "aten.split.Tensor",
        "aten.view.default",
    }
)
SQRT_OPERATIONS = frozenset({"aten.sqrt_.default", "aten._to_copy.default", "aten.copy_.default"})
_ROOT_ELEMENTS = 1 << 18


def rounded(number: float) -> float:
    """Return the float32 value nearest to a number, by which a tensor may be multiplied."""
    return float(np.float32(number))


def power(base: float, exponent: int) -> float:
    """Compute a power in float64 by squaring and multiplying, from the exponent's highest bit.

    The C library's ``pow`` has other last bits in other libraries and on other processors.

    Args:
        base: Base.
        exponent: Exponent, at least 0.
    """
    product = 1.0
    for bit in f"{exponent:b}":
        product *= product
        if bit == "1":
            product *= base
    return product


def sqrt(values: Tensor) -> Tensor:
    """Compute correctly rounded square roots of float32 numbers; ``values`` is not written.

    The root is computed in float64 and rounded. No float32 number has a root that is within four units in the
    last place of float64 of the middle between two float32 numbers, so a float64 root that is off by less is
    rounded to the same float32 number as the exact one. (docs/updates.md has the proof.)
    """
    if values.device.type != "cpu":
        return values.double().sqrt_().float()
    roots = torch.empty(values.shape)
    # Parts that stay in a processor's cache take a third of the time.
    for part, target in zip(
        values.flatten().split(_ROOT_ELEMENTS), roots.view(-1).split(_ROOT_ELEMENTS), strict=True
    ):
        target.copy_(part.double().sqrt_())
    return roots


# Two operands, then their sum, difference, product and quotient, and the root of the first, all as bits.
# The first two rows have subnormal numbers among them.
_KNOWN = (
    (0x006CE3EE, 0x006CC80E, 0x00D9ABFC, 0x00001BE0, 0x00000000, 0x3F8020CD, 0x1FEC1E4A),
    (0x1E8DABC6, 0x1E3CE508, 0x1EEC1E4A, 0x1DBCE508, 0x0001A224, 0x3FC00000, 0x2F06A981),
    (0x3F800000, 0x40400000, 0x40800000, 0xC0000000, 0x40400000, 0x3EAAAAAB, 0x3F800000),
    (0x4B7FFFFF, 0x3FC00000, 0x4B800000, 0x4B7FFFFE, 0x4BBFFFFF, 0x4B2AAAAA, 0x457FFFFF),
)


def check_arithmetic(device: torch.device) -> None:
    """Check that a device computes some float32 operations as IEEE 754 has them, with subnormals.

    Args:
        device: Device that updates are computed on.

    Raises:
        UserError: It does not. Its updates could not be replayed elsewhere.
    """
    known = torch.tensor(_KNOWN, dtype=torch.int64).to(torch.int32).view(torch.float32).T.to(device)
    first, second = known[0].clone(), known[1].clone()
    found = torch.stack([first + second, first - second, first * second, first / second, sqrt(first)])
    if not torch.equal(found.view(torch.int32), known[2:].contiguous().view(torch.int32)):
        raise UserError(
            f"the device {device} does not compute float32 as IEEE 754 has it, so no other machine could "
            "replay its updates. A library of this process may have subnormal numbers flushed to zero "
            "(-ffast-math, torch.set_flush_denormal): leave it out"
        )
