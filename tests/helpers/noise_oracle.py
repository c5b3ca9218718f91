"""What the three operations of the noise must give, computed from the NumPy definition."""

import numpy as np
import torch

from shardes.noise import GAUSSIAN, LowRank, Rademacher, definition, matrix_shape

ELEMENTWISE = [GAUSSIAN, Rademacher()]
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


def perturbed(source, target_dtype, *, region, sigma, kind=GAUSSIAN, **address):
    step = torch.from_numpy(np.float32(sigma) * noise_at(region, kind=kind, **address))
    return (source.to(target_dtype).float() + step).to(target_dtype)


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
        total = total + np.float32(coefficient) * eps
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
