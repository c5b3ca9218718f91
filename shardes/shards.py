"""Which elements of which parameter a rank holds."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """Elements that are contiguous both in a shard and in the whole parameter.

    Attributes:
        local_start: First element within the shard.
        global_start: Row-major index of the same element in the whole parameter.
        length: Number of elements.
    """

    local_start: int
    global_start: int
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The run's view of a flat tensor laid out like the shard."""
        return flat[self.local_start : self.local_start + self.length]


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
        return sum(run.length for run in self.runs)
