"""The three operations on tensors that use noise: perturb, accumulate and add.

They check the tensors, and then call the code of the kind of noise and of the device. Every implementation
gives the bits of the kind's NumPy definition.
"""

from collections.abc import Sequence

import torch

from shardes.noise.definition import NOISE_VERSION as NOISE_VERSION
from shardes.noise.definition import Draw as Draw
from shardes.noise.definition import NoiseKey
from shardes.noise.definition import data_order as data_order
from shardes.noise.definition import sampling_uniforms as sampling_uniforms
from shardes.noise.kinds import base
from shardes.noise.kinds.base import NoiseKind
from shardes.noise.kinds.gaussian import Gaussian
from shardes.noise.kinds.low_rank import LowRank as LowRank
from shardes.noise.kinds.low_rank import factors as factors
from shardes.noise.kinds.low_rank.matrices import matrix_shape as matrix_shape
from shardes.noise.kinds.rademacher import Rademacher as Rademacher
from shardes.noise.region import Region

GAUSSIAN = Gaussian()
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
    kind: NoiseKind = GAUSSIAN,
) -> None:
    """Write ``round(centre + sigma * eps)`` to ``target``; the centre is ``source`` rounded to its dtype.

    If the kind has parts, only the elements of the direction's part are written.

    Args:
        source: The master: float32, bfloat16 or float16, contiguous, one element for each of the region. It
            is not written.
        target: The working tensor: any of the three dtypes, otherwise like ``source``.
        region: Elements of the parameter that the tensors hold.
        sigma: Noise scale, used as float32.
        seed: The run's seed.
        iteration: Iteration, below 2**32.
        direction: Direction within the iteration, below 2**24.
        kind: Kind of noise.

    Raises:
        ValueError: A tensor of another dtype, size or device, or one that is not contiguous.
    """
    _check_pair(source, target, region)
    if region.num_elements == 0:
        return
    kind.perturb(source, target, region, sigma=sigma, key=NoiseKey(seed, iteration), direction=direction)


def restore(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    region: Region,
    seed: int,
    iteration: int,
    direction: int,
    kind: NoiseKind = GAUSSIAN,
) -> None:
    """Write the centre to the elements of ``target`` that ``perturb`` with the same arguments writes.

    Args:
        source: The master, as for ``perturb``.
        target: The working tensor, as for ``perturb``.
        region: Elements of the parameter that the tensors hold.
        seed: The run's seed.
        iteration: Iteration, below 2**32.
        direction: Direction within the iteration, below 2**24.
        kind: Kind of noise.

    Raises:
        ValueError: As ``perturb``.
    """
    _check_pair(source, target, region)
    if region.num_elements == 0:
        return
    kind.restore(source, target, region, key=NoiseKey(seed, iteration), direction=direction)


def accumulate(
    master: torch.Tensor,
    *,
    region: Region,
    coefficients: Sequence[float],
    directions: Sequence[int],
    seed: int,
    iteration: int,
    kind: NoiseKind = GAUSSIAN,
) -> None:
    """Add ``sum_n coefficients[n] * eps(directions[n])`` to ``master``, in one pass.

    The sum starts at 0 and goes in the order given, in float32, one multiplication and one addition a term. A
    float32 master takes it as it is; a bfloat16 or float16 master is rounded stochastically, with bits that
    are a pure function of (seed, iteration, parameter, element) too. If the kind has parts, an element's sum
    has the directions whose part it belongs to. Noise of low rank has a term for each
    column of the factors, and the coefficient is multiplied into the left one first.

    Args:
        master: float32, bfloat16 or float16, contiguous; changed in place.
        region: Elements of the parameter that the tensors hold.
        coefficients: Coefficients, one per direction, used as float32.
        directions: Directions within the iteration, each below 2**24.
        seed: The run's seed.
        iteration: Iteration, below 2**32.
        kind: Kind of noise.

    Raises:
        ValueError: A tensor of another dtype or size, or one that is not contiguous; not as many coefficients
            as directions.
    """
    _check("master", master, region)
    if len(coefficients) != len(directions):
        raise ValueError(f"got {len(coefficients)} coefficients for {len(directions)} directions")
    if region.num_elements == 0:
        return
    key = NoiseKey(seed, iteration)
    kind.accumulate(master, region, key=key, coefficients=coefficients, directions=directions)


def add(master: torch.Tensor, delta: torch.Tensor, *, region: Region, seed: int, iteration: int) -> None:
    """Add ``delta`` to ``master``, rounding as ``accumulate`` does: bit for bit the same for the same sum.

    For steps that are more than a sum of noise. ``accumulate`` to a float32 tensor of zeros, and then ``add``
    of that to a master, gives what ``accumulate`` to the master would.

    Args:
        master: float32, bfloat16 or float16, contiguous; changed in place. float32 takes the sum as it is,
            the others are rounded stochastically.
        delta: float32, contiguous, as many elements, on the same device. It is not written.
        region: Elements of the parameter that the tensors hold.
        seed: The run's seed.
        iteration: Iteration, below 2**32.

    Raises:
        ValueError: A tensor of another dtype, size or device, or one that is not contiguous.
    """
    _check("master", master, region)
    _check("delta", delta, region)
    if delta.dtype != torch.float32:
        raise ValueError(f"delta is {delta.dtype}; wanted float32")
    if master.device != delta.device:
        raise ValueError(f"master is on {master.device} and delta on {delta.device}; wanted one device")
    device_kernels = base.kernels("shardes.noise", master.device)
    if region.num_elements == 0:
        return
    if master.dtype == torch.float32:
        master.view(-1).add_(delta.view(-1))  # one IEEE addition an element, on any device
        return
    device_kernels.add(master, delta, region, key=NoiseKey(seed, iteration))


def _check_pair(source: torch.Tensor, target: torch.Tensor, region: Region) -> None:
    _check("source", source, region)
    _check("target", target, region)
    if source.device != target.device:
        raise ValueError(f"source is on {source.device} and target on {target.device}; wanted one device")


def _check(name: str, tensor: torch.Tensor, region: Region) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; wanted float32, bfloat16 or float16")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); pass a contiguous tensor")
    if tensor.numel() != region.num_elements:
        raise ValueError(f"{name} has {tensor.numel()} elements, but its region has {region.num_elements}")
