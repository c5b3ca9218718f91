"""eps, the noise: a pure function of (seed, iteration, direction, parameter, element).

The three operations below are all that the rest of the program needs. They pick the kernel that fits the
device: numba's on a CPU, Triton's on a GPU. Every kernel gives the bits of ``definition.py``.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch

from shardes.noise import lowrank
from shardes.noise.definition import (
    NOISE_VERSION,
    Kind,
    LowRank,
    NoiseKind,
    data_order,
    matrix_shape,
    sampling_uniforms,
    seed_key,
)
from shardes.noise.region import Region

__all__ = [
    "NOISE_VERSION",
    "Kind",
    "LowRank",
    "NoiseKind",
    "Region",
    "accumulate",
    "add",
    "data_order",
    "factors",
    "matrix_shape",
    "perturb",
    "sampling_uniforms",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def perturb(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    region: Region,
    sigma: float,
    seed: int,
    iteration: int,
    direction: int,
    kind: Kind = NoiseKind.GAUSSIAN,
) -> None:
    """Writes ``round(centre + sigma * eps)`` to ``target``; the centre is ``source`` rounded to its dtype.

    Args:
        source: The master; float32, bfloat16 or float16, contiguous, one element for each of the region. It
            is not written.
        target: The working tensor; any of the three dtypes, otherwise like ``source``.
        region: Which elements they are.
        sigma: Noise scale, used as float32.
        seed: The run's seed.
        iteration: Below 2**32.
        direction: Below 2**24.
        kind: Which noise.

    Raises:
        ValueError: A tensor of another dtype, size or device, or one that is not contiguous.
    """
    _check("source", source, region)
    _check("target", target, region)
    if source.device != target.device:
        raise ValueError(f"source is on {source.device} and target on {target.device}; wanted one device")
    if region.num_elements == 0:
        return
    if isinstance(kind, LowRank):
        if _is_matrix(region):
            made = _factors(
                source.device, region, kind, seed=seed, iteration=iteration, directions=[direction]
            )
            lowrank.perturb(made.kernels, source, target, region=region, sigma=sigma, factors=made)
            return
        kind = NoiseKind.GAUSSIAN
    _kernels(source.device).perturb(
        source,
        target,
        region,
        sigma=sigma,
        kind=kind,
        words=(region.param_id << 8, direction << 8 | kind.stream, iteration),
        key=seed_key(seed),
    )


def accumulate(
    master: torch.Tensor,
    *,
    region: Region,
    coefficients: Sequence[float],
    directions: Sequence[int],
    seed: int,
    iteration: int,
    kind: Kind = NoiseKind.GAUSSIAN,
) -> None:
    """Adds ``sum_n coefficients[n] * eps(directions[n])`` to ``master``, in one pass.

    The sum starts at 0 and goes in the order given, in float32, one multiplication and one addition a term. A
    float32 master takes it as it is; a bfloat16 or float16 master is rounded stochastically, with bits that
    are a pure function of (seed, iteration, parameter, element) too. Noise of low rank has a term for each
    column of the factors, and the coefficient is multiplied into the left one first.

    Args:
        master: float32, bfloat16 or float16, contiguous; changed in place.
        region: Which elements they are.
        coefficients: One per direction, used as float32.
        directions: Each below 2**24.
        seed: The run's seed.
        iteration: Below 2**32.
        kind: Which noise.

    Raises:
        ValueError: A tensor of another dtype or size, or one that is not contiguous; not as many coefficients
            as directions.
    """
    _check("master", master, region)
    if len(coefficients) != len(directions):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(directions)} directions")
    if region.num_elements == 0:
        return
    if isinstance(kind, LowRank):
        if _is_matrix(region):
            made = _factors(
                master.device, region, kind, seed=seed, iteration=iteration, directions=directions
            )
            lowrank.accumulate(made.kernels, master, region=region, coefficients=coefficients, factors=made)
            return
        kind = NoiseKind.GAUSSIAN
    stream = kind.stream
    _kernels(master.device).accumulate(
        master,
        region,
        coefficients=coefficients,
        kind=kind,
        word1=region.param_id << 8,
        direction_words=[direction << 8 | stream for direction in directions],
        word3=iteration,
        key=seed_key(seed),
    )


def add(master: torch.Tensor, delta: torch.Tensor, *, region: Region, seed: int, iteration: int) -> None:
    """Adds ``delta`` to ``master``, rounding as ``accumulate`` does: bit for bit the same for the same sum.

    For steps that are more than a sum of noise. ``accumulate`` to a float32 tensor of zeros, and then ``add``
    of that to a master, gives what ``accumulate`` to the master would.

    Args:
        master: float32, bfloat16 or float16, contiguous; changed in place. float32 takes the sum as it is,
            the others are rounded stochastically.
        delta: float32, contiguous, as many elements, on the same device. It is not written.
        region: Which elements they are.
        seed: The run's seed.
        iteration: Below 2**32.

    Raises:
        ValueError: A tensor of another dtype, size or device, or one that is not contiguous.
    """
    _check("master", master, region)
    _check("delta", delta, region)
    if delta.dtype != torch.float32:
        raise ValueError(f"delta is {delta.dtype}; wanted float32")
    if master.device != delta.device:
        raise ValueError(f"master is on {master.device} and delta on {delta.device}; wanted one device")
    kernels = _kernels(master.device)
    if region.num_elements == 0:
        return
    if master.dtype == torch.float32:
        master.view(-1).add_(delta.view(-1))  # one IEEE addition an element, on any device
        return
    kernels.add(master, delta, region, word1=region.param_id << 8, word3=iteration, key=seed_key(seed))


def factors(
    *,
    kind: LowRank,
    param_id: int,
    shape: Sequence[int],
    seed: int,
    iteration: int,
    directions: Sequence[int],
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the low-rank noise of a whole parameter is made of: eps = left @ right^T, but for rounding.

    Args:
        kind: The rank.
        param_id: Of the parameter.
        shape: The parameter's, [m, n] or [e, m, n].
        seed: The run's seed.
        iteration: Below 2**32.
        directions: Each below 2**24.
        device: Where the factors are wanted.

    Returns:
        A / sqrt(rank) and B of every direction: float32 of shape [directions, m, rank] and [directions, n,
        rank], or [directions, e, m, rank] and [directions, e, n, rank].

    Raises:
        ValueError: The parameter is no matrix.
    """
    view = matrix_shape(shape)
    if view is None:
        raise ValueError(f"a parameter of shape {list(shape)} has no factors")
    count, height, width = view
    region = Region(param_id, count * height * width, 0, 0, shape=tuple(shape))
    made = _factors(device, region, kind, seed=seed, iteration=iteration, directions=directions)
    # All rows of all matrices, and as many columns: of the factors alone nothing is taken apart.
    tile = lowrank.Tile(0, 0, count * height, 0, count * width, 0, 0)
    left, right = made.left(tile).mT, made.right(tile).mT
    several = (len(directions), *shape[:-2])
    return left.reshape(*several, height, kind.rank), right.reshape(*several, width, kind.rank)


def _is_matrix(region: Region) -> bool:
    if region.shape is None:
        raise ValueError(f"noise of low rank needs the parameter's shape; got {region}")
    return matrix_shape(region.shape) is not None


def _factors(
    device: torch.device,
    region: Region,
    kind: LowRank,
    *,
    seed: int,
    iteration: int,
    directions: Sequence[int],
) -> lowrank.Factors:
    assert region.shape is not None, "checked before"
    return lowrank.Factors(
        _kernels(device, low_rank=True),
        device,
        kind,
        region.param_id,
        region.shape[-1],
        seed,
        iteration,
        directions,
    )


def _check(name: str, tensor: torch.Tensor, region: Region) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; wanted float32, bfloat16 or float16")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); pass a contiguous tensor")
    if tensor.numel() != region.num_elements:
        raise ValueError(f"{name} has {tensor.numel()} elements, but its region has {region.num_elements}")


def _kernels(device: torch.device, *, low_rank: bool = False) -> ModuleType:
    """The module whose kernels run on a device; imported when first used."""
    name = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if name is None:
        raise ValueError(f"there is no noise kernel for the device {device}; use a CPU or a CUDA device")
    return import_module(f"shardes.noise.{name}{'_lowrank' if low_rank else ''}")
