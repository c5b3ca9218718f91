"""The interface of a backend, by which shards are perturbed, updated and generated with.

A backend knows shards and forwards. It knows nothing of members, noise or rewards.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.footprint import RankFootprint
from shardes.backends.registry import BACKENDS
from shardes.backends.shard import Shard
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.models.build import parameter_aliases
from shardes.models.conversion import Conversion


class Backend(ABC):
    """A model whose parameters are spread over ranks.

    A subclass sets ``name``, ``shards`` and ``sharded_model``.

    Args:
        skeleton: Model with parameters on meta and real buffers.
        group: Ranks that hold the model together.

    Attributes:
        name: Name in the registry.
        is_preloaded: Whether the shards hold the base weights already, read by another program's own loader.
            They are compared with the weights that shardes reads.
        shards: This rank's part of every parameter, sorted by name; all ranks have the same parameters.
        aliases: Further names of tied weights.
        dtype: Dtype of the model.
        device: Device of this rank's tensors.
        sharded_model: Model whose forward gathers what it needs. If the backend is sharded, its forward is a
            collective that every rank must call equally often.
        conversion: Conversion of the tensors in the checkpoint's files to parameters; None if they have the
            same names.
    """

    name: ClassVar[str]
    is_preloaded: ClassVar[bool] = False
    shards: tuple[Shard, ...]
    sharded_model: nn.Module
    conversion: Conversion | None = None

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        self._group = group
        self.dtype: torch.dtype = skeleton.dtype
        self.device = group.device
        self.aliases = parameter_aliases(skeleton)

    @classmethod
    def build(cls, skeleton: PreTrainedModel, *, config: Config, group: Group) -> Self:
        """Build the backend that a configuration describes; a collective.

        Args:
            skeleton: Model with parameters on meta and real buffers, which the backend takes over.
            config: Configuration of the run.
            group: Ranks that hold the model together.

        Raises:
            UserError: The backend cannot be used with this model, configuration or number of ranks.
        """
        return cls(skeleton, group=group)

    @staticmethod
    @abstractmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute what the first of ``num_ranks`` ranks would hold, without a process group.

        Raises:
            UserError: So many ranks cannot hold the model together.
        """

    @property
    def is_sharded(self) -> bool:
        """Return whether ranks hold different elements; forwards of ``sharded_model`` are then collective."""
        return BACKENDS[self.name].is_sharded and self._group.world_size > 1

    @property
    def needs_same_batch(self) -> bool:
        """Return whether all ranks must pass the same batch to a forward of ``sharded_model``.

        True of tensor parallelism, whose ranks compute parts of one forward. Otherwise each rank's forward
        has a batch of its own, even if it is a collective.
        """
        return BACKENDS[self.name].needs_same_batch and self._group.world_size > 1

    @abstractmethod
    def commit(self) -> None:
        """Make the next forward of ``sharded_model`` see what was written into the shards."""

    @abstractmethod
    def gathered(self) -> nn.Module:
        """Gather the shards into a whole model on this rank and return it; a collective.

        Every call returns the same model in the same storage, so its weights last until the next call.
        """

    def reserve(self) -> None:  # noqa: B027 - a backend without such storage has nothing to do
        """Allocate the storage that ``gathered`` fills, if it has storage of its own; no collective.

        A rank without the memory then fails here by itself, and not in the midst of a collective.
        """

    def close(self) -> None:  # noqa: B027 - most backends end with their tensors
        """End what the backend has started; nothing of it is used afterwards."""

    def release(self) -> None:  # noqa: B027
        """Free the storage of ``reserve``; the next ``reserve`` or ``gathered`` allocates it again."""

    @abstractmethod
    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """Gather one parameter on rank 0; a collective.

        Args:
            shard: This rank's shard of the parameter.
            values: This rank's values, flat, laid out like ``shard.local``; any dtype.

        Returns:
            The whole parameter of shape ``shard.shape`` and the dtype of ``values`` on rank 0, None on the
            other ranks.
        """
