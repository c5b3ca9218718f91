"""What an engine must offer so that shards can be perturbed, updated and generated with.

A backend knows shards and forwards. It knows nothing of populations, noise or rewards.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from shardes.shards import Shard


class Backend(ABC):
    """A model whose parameters are spread over ranks.

    Attributes:
        shards: This rank's part of every parameter, sorted by name. The same parameters on every rank.
        aliases: Further names of tied weights.
        dtype: The model's dtype.
        device: Where this rank's tensors are.
        lockstep_model: The model whose forward gathers what it needs; a collective where shards are spread,
            so that every rank must call it equally often.
    """

    shards: tuple[Shard, ...]
    aliases: set[str]
    dtype: torch.dtype
    device: torch.device
    lockstep_model: nn.Module

    @property
    @abstractmethod
    def is_sharded(self) -> bool:
        """Whether ranks hold different elements; if so, a forward of ``lockstep_model`` is a collective."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the next forward of ``lockstep_model`` see what was written into the shards."""

    @abstractmethod
    def gathered(self) -> nn.Module:
        """A whole model on this rank with what the shards hold now; a collective.

        The model and its storage are the same at every call, so what it holds lasts until the next call.
        """

    @abstractmethod
    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """The whole of one parameter, on rank 0; None elsewhere. A collective.

        Args:
            shard: Which parameter.
            values: This rank's values, flat, laid out like ``shard.local``; any dtype.
        """
