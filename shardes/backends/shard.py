"""Shards: the part of a parameter that a rank holds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardes.noise.region import Region


@dataclass(frozen=True)
class ShardSpan:
    """Rows of elements that follow each other in a shard, and lie a fixed stride apart in the parameter.

    Attributes:
        local_start: Index of the first element in the shard.
        global_start: Row-major index of the same element in the whole parameter.
        length: Elements in a row, which is contiguous both in the shard and in the parameter.
        rows: Number of rows, which lie back to back in the shard.
        stride: Elements from the start of a row to the start of the next in the whole parameter.
    """

    local_start: int
    global_start: int
    length: int
    rows: int = 1
    stride: int = 0

    @property
    def num_elements(self) -> int:
        """Number of elements in all rows."""
        return self.rows * self.length

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the span's view of a flat tensor laid out like the shard."""
        return flat[self.local_start : self.local_start + self.num_elements]

    def parts(self, max_elements: int | None) -> Iterator["ShardSpan"]:
        """Cut the span into pieces, each of several whole rows or of a part of one row.

        Args:
            max_elements: Most elements of a piece; None for a single piece.
        """
        if max_elements is None or self.num_elements <= max_elements:
            yield self
            return
        rows = max(1, max_elements // self.length)
        length = min(self.length, max_elements)
        for row in range(0, self.rows, rows):
            for low in range(0, self.length, length):
                yield ShardSpan(
                    self.local_start + row * self.length + low,
                    self.global_start + row * self.stride + low,
                    min(length, self.length - low),
                    min(rows, self.rows - row),
                    self.stride,
                )

    def inside(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the span's view, of shape [rows, length], of the whole parameter, flat and contiguous."""
        offset = whole.storage_offset() + self.global_start
        return whole.as_strided((self.rows, self.length), (self.stride, 1), offset)


@dataclass(frozen=True)
class Shard:
    """One rank's part of one parameter.

    Attributes:
        name: Name of the parameter in the Hugging Face checkpoint.
        param_id: Index of the name in the sorted list of all parameters, ties counted once.
        shape: Shape of the whole parameter.
        local: Working tensor, flat and writable, of the model's dtype. It may be longer than what the spans
            cover; the rest is padding, which is never read or written.
        spans: Elements that this rank owns; empty if it owns none.
        is_copy: Whether another rank of the group owns the same elements and counts them, so that this one
            must not in a sum over ranks.
    """

    name: str
    param_id: int
    shape: tuple[int, ...]
    local: torch.Tensor
    spans: tuple[ShardSpan, ...]
    is_copy: bool = False

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def num_owned(self) -> int:
        """Number of elements that this rank owns."""
        return sum(span.num_elements for span in self.spans)

    def region(self, span: ShardSpan) -> Region:
        """Return the region of a span's elements in the whole parameter."""
        return Region(
            self.param_id,
            self.num_elements,
            span.global_start,
            span.length,
            rows=span.rows,
            stride=span.stride,
            shape=self.shape,
        )
