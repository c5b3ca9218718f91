"""A whole model on every rank: the oracle that other backends are compared with."""

import torch
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.base import Backend
from shardes.backends.footprint import RankFootprint, parameter_sizes
from shardes.backends.shard import Shard, ShardSpan
from shardes.distributed.group import Group
from shardes.models.build import fill_parameters, parameter_ids


class SingleBackend(Backend):
    """Plain tensors in one process. With several ranks, each is such a process and they share prompts.

    Args:
        skeleton: Model with its parameters on meta; it becomes ``sharded_model``.
        group: Ranks that share the prompts of a member.
    """

    name = "single"

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        super().__init__(skeleton, group=group)
        storage = {
            name: torch.empty(parameter.shape, dtype=parameter.dtype, device=group.device)
            for name, parameter in skeleton.named_parameters()
        }
        fill_parameters(skeleton, storage)
        self.sharded_model = skeleton.to(group.device)
        ids = parameter_ids(list(storage))
        self.shards = tuple(
            Shard(name, ids[name], tuple(tensor.shape), tensor.view(-1), (ShardSpan(0, 0, tensor.numel()),))
            for name, tensor in sorted(storage.items())
        )

    @staticmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute the elements that each of ``num_ranks`` ranks holds: all of them."""
        return RankFootprint(num_ranks, parameter_sizes(skeleton))

    def commit(self) -> None:
        """Do nothing: the shards are the parameters."""

    def gathered(self) -> nn.Module:
        """Return the model itself."""
        return self.sharded_model

    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """Return this rank's values in the parameter's shape on rank 0, None elsewhere."""
        return values.view(shard.shape) if self._group.is_main else None
