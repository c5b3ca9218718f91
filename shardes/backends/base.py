"""What an engine must offer so that shards can be perturbed, updated and generated with.

A backend knows shards and forwards. It knows nothing of populations, noise or rewards.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from shardes.backends.shard import Shard
from shardes.models.conversion import Conversion


class Backend(ABC):
    """A model whose parameters are spread over ranks.

    Attributes:
        shards: This rank's part of every parameter, sorted by name. The same parameters on every rank.
        aliases: Further names of tied weights.
        dtype: The model's dtype.
        device: Where this rank's tensors are.
        lockstep_model: The model whose forward gathers what it needs; a collective where shards are spread,
            so that every rank must call it equally often.
        conversion: How the files' tensors become the model's parameters; None: they have the same names.
    """

    shards: tuple[Shard, ...]
    aliases: set[str]
    dtype: torch.dtype
    device: torch.device
    sharded_model: nn.Module
    conversion: Conversion | None = None

    @property
    @abstractmethod
    def is_sharded(self) -> bool:
        """Whether ranks hold different elements; if so, a forward of ``sharded_model`` is a collective."""

    @property
    def needs_same_batch(self) -> bool:
        """Whether every rank must be given the same batch in a forward of ``sharded_model``.

        True of tensor parallelism, whose ranks compute parts of one forward. Otherwise each rank's forward is
        of a batch of its own, even if it is a collective.
        """
        return False

    @abstractmethod
    def commit(self) -> None:
        """Makes the next forward of ``sharded_model`` see what was written into the shards."""

    @abstractmethod
    def gathered(self) -> nn.Module:
        """A whole model on this rank with what the shards hold now; a collective.

        The model and its storage are the same at every call, so what it holds lasts until the next call.
        """

    def reserve(self) -> None:  # noqa: B027 - a backend without such storage has nothing to do
        """Allocates what ``gathered`` fills, if that is storage of its own; no collective.

        Memory that is not there is then missed here, by one rank alone and not in the midst of a collective.
        """

    def release(self) -> None:  # noqa: B027
        """Frees what ``reserve`` allocated; the next ``reserve`` or ``gathered`` allocates it again."""

    @abstractmethod
    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """The whole of one parameter, on rank 0; None elsewhere. A collective.

        Args:
            shard: Which parameter.
            values: This rank's values, flat, laid out like ``shard.local``; any dtype.
        """
