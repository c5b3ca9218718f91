"""Noise of low rank: for a matrix ``A B^T / sqrt(rank)`` with A and B standard normal.

Vectors have standard normal noise. This module has the definition in NumPy, and what tensors are given.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardes.noise.definition import Floats, Ints, NoiseKey, Stream
from shardes.noise.kinds import base
from shardes.noise.kinds.gaussian import Gaussian, normals
from shardes.noise.kinds.low_rank import tables
from shardes.noise.kinds.low_rank.matrices import matrix_shape
from shardes.noise.kinds.low_rank.tables import Factors
from shardes.noise.region import Region

_VECTORS = Gaussian()


@dataclass(frozen=True)
class LowRank(base.NoiseKind):
    """Noise of low rank for matrices, standard normal noise for vectors.

    Attributes:
        rank: Columns of A and of B.

    Raises:
        ValueError: A rank below 1.
    """

    name = "low_rank"
    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank is {self.rank}; wanted at least 1")

    @property
    def scale(self) -> np.float32:
        """Factor of the elements of A: 1 / sqrt(rank)."""
        return np.float32(1 / math.sqrt(self.rank))

    @property
    def largest(self) -> float:
        """Upper bound of the magnitude of eps."""
        return _VECTORS.largest**2 * math.sqrt(self.rank)

    def check_shape(self, shape: Ints) -> None:
        """Check that a parameter has at most three dimensions.

        Raises:
            ValueError: It has more.
        """
        matrix_shape(shape)

    def element_factors(
        self, *, param_id: int, shape: Ints, start: int, length: int, **address: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Compute in NumPy the factors of elements [start, start + length) of some matrices.

        Args:
            param_id: Index of the parameter in the name-sorted list.
            shape: Shape of the parameter, of two or three dimensions.
            start: Row-major index of the first element in the whole parameter.
            length: Number of elements.
            **address: seed, iteration and direction, as for ``gaussian.normals``.

        Returns:
            The row of A for each element's row, divided by sqrt(rank), and the row of B for its column: both
            float32 of shape [length, rank].
        """
        view, rank = matrix_shape(shape), self.rank
        assert view is not None, "a vector has no factors"
        count, height, width = view
        whole = partial(normals, param_id=param_id, start=0, **address)
        left = whole(length=count * height * rank, stream=Stream.LEFT).reshape(-1, rank) * self.scale
        right = whole(length=count * width * rank, stream=Stream.RIGHT).reshape(-1, rank)
        index = np.arange(start, start + length)
        return left[index // width], right[index // (height * width) * width + index % width]

    def eps(self, *, shape: Ints | None = None, **address: Any) -> NDArray[np.float32]:
        """Compute eps of consecutive elements in NumPy; ``shape`` is required."""
        assert shape is not None, "the noise of a matrix depends on its shape"
        if matrix_shape(shape) is None:
            return normals(**address)
        left, right = self.element_factors(shape=shape, **address)
        eps = np.zeros(len(left), np.float32)
        for k in range(self.rank):
            eps = eps + left[:, k] * right[:, k]
        return eps

    def perturb(
        self, source: Tensor, target: Tensor, region: Region, *, sigma: float, key: NoiseKey, direction: int
    ) -> None:
        """Write ``round(centre + sigma * eps)`` to ``target``."""
        if _is_matrix(region):
            made = self.tables(source.device, region, key, [direction])
            tables.perturb(source, target, region=region, sigma=sigma, factors=made)
        else:
            _VECTORS.perturb(source, target, region, sigma=sigma, key=key, direction=direction)

    def accumulate(
        self, master: Tensor, region: Region, *, key: NoiseKey, coefficients: Floats, directions: Ints
    ) -> None:
        """Add a weighted sum of eps to ``master``."""
        if _is_matrix(region):
            made = self.tables(master.device, region, key, directions)
            tables.accumulate(master, region=region, coefficients=coefficients, factors=made)
        else:
            _VECTORS.accumulate(master, region, key=key, coefficients=coefficients, directions=directions)

    def tables(self, device: torch.device, region: Region, key: NoiseKey, directions: Ints) -> Factors:
        """Return the tables of the factors of a region's parameter, which is a matrix."""
        assert region.shape is not None, "checked before"
        kernels, width = base.kernels(__name__, device), region.shape[-1]
        rank, scale = self.rank, float(self.scale)
        return Factors(kernels, device, rank, scale, region.param_id, width, key, directions)


def factors(
    *,
    kind: LowRank,
    param_id: int,
    shape: Ints,
    seed: int,
    iteration: int,
    directions: Ints,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the factors of a whole parameter's noise: eps = left @ right^T, but for rounding.

    Args:
        kind: Noise, with its rank.
        param_id: Index of the parameter in the name-sorted list.
        shape: Shape of the parameter, [m, n] or [e, m, n].
        seed: The run's seed.
        iteration: Iteration, below 2**32.
        directions: Directions, each below 2**24.
        device: Device of the factors.

    Returns:
        A / sqrt(rank) and B of every direction: float32 of shape [directions, m, rank] and [directions, n,
        rank], or [directions, e, m, rank] and [directions, e, n, rank].

    Raises:
        ValueError: The parameter is not a matrix.
    """
    view = matrix_shape(shape)
    if view is None:
        raise ValueError(f"a parameter of shape {list(shape)} has no factors")
    count, height, width = view
    region = Region(param_id, count * height * width, 0, 0, shape=tuple(shape))
    made = kind.tables(device, region, NoiseKey(seed, iteration), directions)
    # All rows of all matrices, and as many columns: one table for all, because no tensor is tiled.
    tile = tables.Tile(0, 0, count * height, 0, count * width, 0, 0)
    left, right = made.left(tile).mT, made.right(tile).mT
    several = (len(directions), *shape[:-2])
    return left.reshape(*several, height, kind.rank), right.reshape(*several, width, kind.rank)


def make(*, rank: int, num_parts: int) -> LowRank:
    """Return the kind with factors of ``rank`` columns; it has no parts."""
    assert num_parts == 1, "checked with the configuration"
    return LowRank(rank)


def _is_matrix(region: Region) -> bool:
    if region.shape is None:
        raise ValueError(f"noise of low rank needs the parameter's shape; got {region}")
    return matrix_shape(region.shape) is not None
