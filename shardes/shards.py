"""Which elements of which parameter a rank holds."""

import math
from dataclasses import dataclass

import torch

from shardes.noise.region import Region


@dataclass(frozen=True)
class Run:
    """Rows of elements that follow each other in a shard, and lie a fixed stride apart in the parameter.

    Attributes:
        local_start: First element within the shard.
        global_start: Row-major index of the same element in the whole parameter.
        length: Elements in a row: contiguous both in the shard and in the parameter.
        rows: Number of rows; they lie back to back in the shard.
        stride: From the start of a row to the start of the next, in the whole parameter.
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
        """The run's view of a flat tensor laid out like the shard."""
        return flat[self.local_start : self.local_start + self.num_elements]


@dataclass(frozen=True)
class Shard:
    """One rank's part of one parameter.

    Attributes:
        name: The parameter's name in the Hugging Face checkpoint.
        param_id: Index of the name in the sorted list of all parameters, ties counted once.
        shape: Shape of the whole parameter.
        local: The working tensor, flat and writable, of the model's dtype. It may be longer than what the
            runs cover: the rest is padding, which is never read or written.
        runs: The elements that this rank owns; empty if it owns none.
    """

    name: str
    param_id: int
    shape: tuple[int, ...]
    local: torch.Tensor
    runs: tuple[Run, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def num_owned(self) -> int:
        """Number of elements that this rank owns."""
        return sum(run.num_elements for run in self.runs)

    def region(self, run: Run) -> Region:
        """Where a run's elements lie in the whole parameter."""
        return Region(
            self.param_id, self.num_elements, run.global_start, run.length, rows=run.rows, stride=run.stride
        )
