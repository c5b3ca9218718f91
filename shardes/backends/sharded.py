"""What backends whose ranks hold different elements have in common."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.base import Backend
from shardes.backends.gathered_model import GatheredModel, padded
from shardes.backends.layout import Layout
from shardes.backends.shard import Shard
from shardes.distributed.group import Group
from shardes.models.build import parameter_aliases, parameter_ids


def make_shards(
    local: Mapping[str, torch.Tensor],
    *,
    layouts: Mapping[str, Layout],
    shapes: Mapping[str, tuple[int, ...]],
    group: Group,
) -> tuple[Shard, ...]:
    """This rank's shards, sorted by name.

    Args:
        local: The flat working tensor of each parameter.
        layouts: How each is spread over the ranks.
        shapes: The parameters' shapes; a layout may take a parameter as one row.
        group: The ranks.
    """
    ids = parameter_ids(list(local))
    return tuple(
        Shard(
            name,
            ids[name],
            shapes[name],
            local[name],
            layouts[name].spans((group.rank,)),
            is_copy=layouts[name].is_replicated and not group.is_main,
        )
        for name in sorted(local)
    )


class ShardedBackend(Backend):
    """Shards over a one-dimensional mesh of ranks, described by layouts.

    A backend of this kind sets ``_layouts`` (by name), ``shards`` and ``sharded_model``.

    Args:
        skeleton: The model, parameters on meta, buffers real.
        group: The ranks; a process group exists even if there is only one.
    """

    _layouts: Mapping[str, Layout]

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        self._group = group
        self.dtype = skeleton.dtype
        self.device = group.device
        self.aliases = parameter_aliases(skeleton)

    @property
    def is_sharded(self) -> bool:
        """Whether there is more than one rank to shard over."""
        return self._group.world_size > 1

    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """The parts of one parameter, each put where it belongs, on rank 0."""
        layout = self._layouts[shard.name]
        if layout.is_replicated:
            return values[: shard.num_elements].view(shard.shape) if self._group.is_main else None
        spans = [layout.spans((rank,)) for rank in range(self._group.world_size)]
        # A gather wants equal lengths: shorter parts are filled up.
        size = max(sum(span.num_elements for span in of_rank) for of_rank in spans)
        sent = padded(values[: shard.num_owned], size)
        parts = [torch.empty_like(sent) for _ in spans] if self._group.is_main else None
        dist.gather(sent, parts, group=self._group.process_group, group_dst=0)
        if parts is None:
            return None
        whole = values.new_empty(math.prod(shard.shape))
        for part, of_rank in zip(parts, spans, strict=True):
            for span in of_rank:
                span.inside(whole).copy_(span.of(part).view(span.rows, span.length))
        return whole.view(shard.shape)


class GatheringBackend(ShardedBackend):
    """Shards whose parts lie back to back in the parameter, so that a gather gives the whole.

    A backend of this kind sets ``sharded_model`` and calls ``_hold``.
    """

    _replica: GatheredModel

    def _hold(
        self,
        skeleton: PreTrainedModel,
        *,
        local: Mapping[str, torch.Tensor],
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Makes this rank's shards, and a replica of ``skeleton``; arguments as in ``make_shards``."""
        self._layouts = layouts
        self._replica = GatheredModel(skeleton, shards=local, layouts=layouts, group=self._group)
        self.shards = make_shards(local, layouts=layouts, shapes=shapes, group=self._group)

    def gathered(self) -> nn.Module:
        """A hook-free replica, filled from all ranks' shards."""
        return self._replica.fill()

    def reserve(self) -> None:
        """Allocates the replica."""
        self._replica.allocate()

    def release(self) -> None:
        """Frees the replica."""
        self._replica.free()
