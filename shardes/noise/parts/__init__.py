"""Parts of the parameters, of which a direction's noise covers one: their definition in NumPy.

docs/noise.md states the same in words. The modules ``cpu`` and ``gpu`` have the kernels.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shardes.noise.definition import Floats, Ints, part_shifts
from shardes.noise.region import Region

# Numbers of parts are below this.
MAX_PARTS = 2**16
# Parameters from this size on have larger blocks, for which memory is less often fetched, and pages are less
# often looked up, for a few elements.
LARGE_PARAMETER, LARGE_BLOCK = 2**20, 8192


def scale_of(num_parts: int) -> np.float32:
    """Return the factor of the noise in a part: the root of the number of parts, as float32."""
    return np.float32(math.sqrt(num_parts))


def part_of_direction(direction: int, num_parts: int) -> int:
    """Return the part that a direction's noise covers."""
    return direction % num_parts


@dataclass(frozen=True)
class Parts:
    """Division of a parameter into parts of equal size, drawn anew in each iteration.

    Attributes:
        num: Number of parts.
        block: Elements of a block, all of which belong to one part.
    """

    num: int
    block: int

    @classmethod
    def of_size(cls, num: int, block: int, *, param_size: int) -> Self:
        """Return the division of a parameter of some size.

        Args:
            num: Number of parts.
            block: Elements of a block of small parameters, which divides ``LARGE_BLOCK``.
            param_size: Number of elements of the whole parameter.
        """
        return cls(num, block if param_size < LARGE_PARAMETER else LARGE_BLOCK)

    @property
    def group(self) -> int:
        """Elements of a group of blocks, of which each part has one."""
        return self.num * self.block

    def covers(self, *, start: int, length: int, direction: int, **address: Any) -> NDArray[np.bool_]:
        """Return for consecutive elements whether a direction's noise covers them.

        Args:
            start: Row-major index of the first element in the whole parameter.
            length: Number of elements.
            direction: Direction within the iteration.
            **address: seed, iteration and param_id, as for ``part_shifts``.

        Returns:
            bool of shape [length].
        """
        block = np.arange(start, start + length) // self.block
        first, count = self.groups(start, start + length)
        shifts = part_shifts(first=first, count=count, num_parts=self.num, **address)
        part = (block % self.num + shifts[block // self.num - first]) % self.num
        return part == part_of_direction(direction, self.num)

    def groups(self, start: int, end: int) -> tuple[int, int]:
        """Return the number of the first group that elements [start, end) touch, and how many they touch.

        The group behind them counts, for ``per_row`` may.
        """
        first = start // self.group
        return first, max(-(-end // self.group) - first, 0) + 1

    def per_row(self, region: Region, size: int) -> int:
        """Return how many runs of ``size`` elements, each from a multiple of it on, a row may touch."""
        # With one row it is known; rows that start anywhere may touch one more than they fill.
        offset = region.start % size if region.rows == 1 else size - 1
        return (offset + region.length - 1) // size + 1

    def by_part(
        self, coefficients: Floats, words: Ints, directions: Ints
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.uint32]]:
        """Sort the terms of an update by the part that they belong to, keeping the order within each.

        Args:
            coefficients: Coefficient of each term.
            words: Counter word of each term's direction.
            directions: Direction of each term.

        Returns:
            The place of each part's first term, and the number of terms, int64 of shape [num + 1]; the scaled
            coefficients, float32, and the words, uint32, both of shape [terms].
        """
        part = np.array([part_of_direction(direction, self.num) for direction in directions], np.int64)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(self.num + 1))
        scaled = np.asarray(coefficients, np.float32) * scale_of(self.num)
        return bounds, scaled[order], np.asarray(words, np.uint32)[order]
