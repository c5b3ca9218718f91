"""Base classes of backends whose ranks hold different elements."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.base import Backend
from shardes.backends.gathered_model import GatheredModel, padded
from shardes.backends.layout import Layout
from shardes.backends.shard import Shard, ShardSpan
from shardes.distributed.group import Group
from shardes.models.build import parameter_ids


def make_shards(
    skeleton: nn.Module,
    *,
    local: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
    group: Group,
) -> tuple[Shard, ...]:
    """Make this rank's shards, sorted by name.

    Args:
        skeleton: Model with parameters of whole shapes.
        local: Flat working tensor of each parameter, by name.
        layouts: Layout of each parameter over the ranks, which may treat it as one row.
        group: Ranks that the parameters are spread over.
    """
    ids = parameter_ids(list(local))
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
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

    A backend of this kind sets ``_layouts`` (by name), ``shards`` and ``sharded_model``; or it says otherwise
    which spans of a parameter each rank owns.

    Args:
        skeleton: Model with parameters on meta and real buffers.
        group: Ranks to shard over; a process group exists even if there is only one.
    """

    _layouts: Mapping[str, Layout]

    def _spans_of_ranks(self, shard: Shard) -> list[tuple[ShardSpan, ...]]:
        """Return the spans of a parameter that each rank owns."""
        return [self._layouts[shard.name].spans((rank,)) for rank in range(self._group.world_size)]

    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """Gather the parts of one parameter on rank 0, and put each where it belongs."""
        spans = self._spans_of_ranks(shard)
        if all(of_rank == (ShardSpan(0, 0, shard.num_elements),) for of_rank in spans):
            return values[: shard.num_elements].view(shard.shape) if self._group.is_main else None
        # A gather wants equal lengths: shorter parts are filled up.
        ends = [max((s.local_start + s.num_elements for s in of_rank), default=0) for of_rank in spans]
        sent = padded(values[: ends[self._group.rank]], max(ends))
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
    ) -> None:
        """Make this rank's shards, and a replica of ``skeleton``; arguments as in ``make_shards``."""
        self._layouts = layouts
        self._replica = GatheredModel(skeleton, shards=local, layouts=layouts, group=self._group)
        self.shards = make_shards(skeleton, local=local, layouts=layouts, group=self._group)

    def gathered(self) -> nn.Module:
        """Fill the replica, which has no hooks, from all ranks' shards and return it."""
        return self._replica.fill()

    def reserve(self) -> None:
        """Allocate the replica."""
        self._replica.allocate()

    def release(self) -> None:
        """Free the replica."""
        self._replica.free()
