"""What the three operations of the noise must give, computed from the NumPy definition."""

import numpy as np
import torch

from shardes.noise import GAUSSIAN, LowRank, Rademacher, definition, matrix_shape
from shardes.noise.kinds.gaussian import Gaussian

ELEMENTWISE = [GAUSSIAN, Rademacher()]
# Parts of one block in a group, of several, and more parts than a short region has blocks.
IN_PARTS = [Gaussian(2), Gaussian(5), Rademacher(3), Gaussian(64)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def _over_rows(function, region, **address):
    """A function of (start, length), at a region's elements, in the order in which a tensor holds them."""
    rows = [
        function(
            param_id=region.param_id,
            start=region.start + row * region.stride,
            length=region.length,
            **address,
        )
        for row in range(region.rows)
    ]
    return np.concatenate(rows) if rows else function(param_id=0, start=0, length=0, **address)


def noise_at(region, *, kind=GAUSSIAN, **address):
    """eps at a region's elements; float32."""
    return _over_rows(kind.eps, region, shape=region.shape, **address)


def covered(region, *, kind=GAUSSIAN, **address):
    """Whether a direction's noise changes a region's elements."""
    return _over_rows(kind.covers, region, param_size=region.param_size, **address)


def perturbed(source, target_dtype, *, region, sigma, kind=GAUSSIAN, before=None, **address):
    """The target; ``before`` is what it was, for kinds with parts. None: the centre."""
    step = torch.from_numpy(np.float32(sigma) * kind.part_scale * noise_at(region, kind=kind, **address))
    centre = source.to(target_dtype)
    moved = (centre.float() + step).to(target_dtype)
    is_covered = torch.from_numpy(covered(region, kind=kind, **address))
    return torch.where(is_covered, moved, centre if before is None else before)


def restored(source, before, *, region, kind=GAUSSIAN, **address):
    """The target, whose dtype ``before`` has, after the centre was put back where the noise changes it."""
    is_covered = torch.from_numpy(covered(region, kind=kind, **address))
    return torch.where(is_covered, source.to(before.dtype), before)


def accumulated(master, *, region, coefficients, directions, kind=GAUSSIAN, seed, iteration):
    total = np.zeros(region.num_elements, np.float32)
    for direction, coefficient in zip(directions, coefficients, strict=True):
        if isinstance(kind, LowRank) and matrix_shape(region.shape) is not None:
            address = {"shape": region.shape, "seed": seed, "iteration": iteration, "direction": direction}
            left = _over_rows(lambda **a: kind.element_factors(**a)[0], region, **address)
            right = _over_rows(lambda **a: kind.element_factors(**a)[1], region, **address)
            for k in range(kind.rank):
                total = total + (left[:, k] * np.float32(coefficient)) * right[:, k]
            continue
        eps = noise_at(region, kind=kind, seed=seed, iteration=iteration, direction=direction)
        moved = total + np.float32(coefficient) * kind.part_scale * eps
        is_covered = covered(region, kind=kind, seed=seed, iteration=iteration, direction=direction)
        total = np.where(is_covered, moved, total)
    return added(master, torch.from_numpy(total), region=region, seed=seed, iteration=iteration)


def added(master, delta, *, region, seed, iteration):
    moved = master.float() + delta
    if master.dtype == torch.float32:
        return moved
    bits = _over_rows(definition.rounding_bits, region, seed=seed, iteration=iteration)
    narrow = {torch.bfloat16: definition.round_to_bfloat16, torch.float16: definition.round_to_float16}
    return torch.from_numpy(narrow[master.dtype](moved.numpy(), bits).view(np.int16)).view(master.dtype)


def same_bits(a, b):
    """Equal dtype, shape and bits, but for the payload of NaNs."""
    width = {4: torch.int32, 2: torch.int16}[a.element_size()]
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    numbers = ~a.isnan()
    return torch.equal(a[numbers].view(width), b[numbers].view(width))
