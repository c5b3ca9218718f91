"""Every rank holds the whole model: the oracle that other backends are compared with."""

import torch
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.base import Backend
from shardes.backends.shard import Shard, ShardSpan
from shardes.distributed.group import Group
from shardes.models.build import fill_parameters, parameter_aliases, parameter_ids


class SingleBackend(Backend):
    """Plain tensors in one process. With several ranks, each is such a process and they share prompts.

    Args:
        skeleton: The model, parameters on meta.
        group: The ranks.
    """

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        self._group = group
        self.dtype = skeleton.dtype
        self.device = group.device
        self.aliases = parameter_aliases(skeleton)
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

    @property
    def is_sharded(self) -> bool:
        """Never: every rank holds everything."""
        return False

    def commit(self) -> None:
        """Nothing to do: the shards are the parameters."""

    def gathered(self) -> nn.Module:
        """The model itself."""
        return self.sharded_model

    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """Rank 0's own values."""
        return values.view(shard.shape) if self._group.is_main else None
