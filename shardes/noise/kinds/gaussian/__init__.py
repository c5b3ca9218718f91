"""Standard normal noise: its definition in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardes.noise.definition import BLOCK, Stream, box_muller, element_words
from shardes.noise.kinds.base import ElementwiseNoise


def normals(
    *, start: int, length: int, stream: Stream = Stream.GAUSSIAN, **address: int
) -> NDArray[np.float32]:
    """Compute the standard normals of elements [start, start + length) of one parameter.

    Args:
        start: Row-major index of the first element in the whole parameter.
        length: Number of elements.
        stream: Counters to draw from; for a factor of low-rank noise, elements are the factor's.
        **address: seed, the run's, below 2**64; iteration, below 2**32; direction, the index of the direction
            within the iteration, below 2**24; param_id, the index of the parameter in the name-sorted list,
            below 2**24.

    Returns:
        float32 of shape [length].
    """
    words = element_words(start=start, length=length, stream=stream, **address)
    quarters = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return np.stack(quarters, axis=1).reshape(-1)[start % BLOCK :][:length]


@dataclass(frozen=True)
class Gaussian(ElementwiseNoise):
    """Standard normal noise."""

    name = "gaussian"
    stream = Stream.GAUSSIAN
    largest_eps = 6.67
    part_block = 8 * BLOCK

    def eps(self, *, shape: Sequence[int] | None = None, **address: Any) -> NDArray[np.float32]:
        """Compute eps of consecutive elements in NumPy."""
        return normals(**address)


def make(*, rank: int, num_parts: int) -> Gaussian:
    """Return the kind; it has no rank."""
    return Gaussian(num_parts)
