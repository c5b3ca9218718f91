"""Noise of +1 and -1 with equal probability: its definition in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardes.noise.definition import SIGN_BLOCK, Stream, element_words
from shardes.noise.kinds.base import ElementwiseNoise


def signs(*, start: int, length: int, **address: int) -> NDArray[np.float32]:
    """Compute the signs of elements [start, start + length), one bit an element; arguments as in ``normals``.

    Returns:
        float32 of shape [length]: +1 or -1.
    """
    words = element_words(start=start, length=length, stream=Stream.RADEMACHER, block=SIGN_BLOCK, **address)
    bits = words[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    in_order = bits.transpose(1, 0, 3, 2).reshape(-1)  # block, word, bit, lane
    return (np.float32(1) - np.float32(2) * in_order.astype(np.float32))[start % SIGN_BLOCK :][:length]


@dataclass(frozen=True)
class Rademacher(ElementwiseNoise):
    """Noise of +1 and -1 with equal probability."""

    name = "rademacher"
    stream = Stream.RADEMACHER
    largest_eps = 1.0
    part_block = SIGN_BLOCK

    def eps(self, *, shape: Sequence[int] | None = None, **address: Any) -> NDArray[np.float32]:
        """Compute eps of consecutive elements in NumPy."""
        return signs(**address)


def make(*, rank: int, num_parts: int) -> Rademacher:
    """Return the kind; it has no rank."""
    return Rademacher(num_parts)
