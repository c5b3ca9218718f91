"""The elements of a parameter that a flat tensor holds."""

import math
from dataclasses import dataclass

from shardes.noise.definition import MAX_ELEMENTS, MAX_PARAM_ID


@dataclass(frozen=True)
class Region:
    """Rows of consecutive elements of one parameter, each row a fixed stride after the one before.

    A ZeRO-3 shard is one row; a shard of a matrix's columns has one row per row of the matrix.

    Attributes:
        param_id: The parameter's index in the name-sorted list.
        param_size: Number of elements of the whole parameter.
        start: Row-major index of the first element in the whole parameter.
        length: Number of elements in a row.
        rows: Number of rows.
        stride: Elements from the start of a row to the start of the next; not used with one row.
        shape: Shape of the whole parameter; only noise of low rank needs it.

    Raises:
        ValueError: The region is not inside the parameter, its rows overlap, the shape has another size, or a
            number is too large for the noise's counter.
    """

    param_id: int
    param_size: int
    start: int
    length: int
    rows: int = 1
    stride: int = 0
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.param_id <= MAX_PARAM_ID:
            raise ValueError(f"param_id is {self.param_id}; wanted 0 to {MAX_PARAM_ID}")
        if not 0 <= self.param_size <= MAX_ELEMENTS:
            raise ValueError(
                f"parameter {self.param_id} has {self.param_size} elements; wanted at most {MAX_ELEMENTS}, "
                "which is 2**34"
            )
        if min(self.start, self.length, self.rows) < 0:
            raise ValueError(f"start, length and rows must not be negative; got {self}")
        if self.rows > 1 and self.stride < self.length:
            raise ValueError(
                f"rows of {self.length} elements with a stride of {self.stride} overlap; wanted a stride of "
                "at least the length"
            )
        if self.num_elements and self.end > self.param_size:
            raise ValueError(
                f"elements up to {self.end} do not lie inside parameter {self.param_id}, which has "
                f"{self.param_size}; got {self}"
            )

        if self.shape is not None and math.prod(self.shape) != self.param_size:
            raise ValueError(f"a parameter of shape {self.shape} has not {self.param_size} elements")

    @property
    def num_elements(self) -> int:
        """Number of elements in all rows."""
        return self.rows * self.length

    @property
    def end(self) -> int:
        """Index after the last element."""
        return self.start + (self.rows - 1) * self.stride + self.length if self.num_elements else self.start
