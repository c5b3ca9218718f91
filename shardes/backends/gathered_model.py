"""A whole model on every rank, without hooks, filled from shards by a few large gathers."""

from collections.abc import Mapping

import torch
from torch import nn

from shardes.backends.layout import Layout
from shardes.distributed.group import Group
from shardes.models.build import fill_parameters

# Bytes of a rank's shards that are copied together to be gathered at once. On the CPU a collective takes as
# long to begin as a copy of this size.
BUCKET_BYTES = {"cuda": 16 * 2**20, "cpu": 2**20}


class GatheredModel:
    """A whole model at stable addresses. Storage is allocated at the first use.

    Args:
        skeleton: Model with parameters on meta and real buffers; it becomes the replica.
        shards: This rank's flat shard of each parameter, by name, with padding behind the owned elements.
        layouts: Layout of each parameter, whose parts must lie back to back in the parameter.
        group: Ranks that hold the shards.

    Raises:
        ValueError: The parts of a layout do not lie back to back.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        *,
        shards: Mapping[str, torch.Tensor],
        layouts: Mapping[str, Layout],
        group: Group,
    ) -> None:
        scattered = [name for name in shards if not layouts[name].is_flat]
        if scattered:
            raise ValueError(
                f"{scattered[0]} is spread as {layouts[scattered[0]]}; a gather needs flat parts"
            )
        self._model = skeleton
        self._group = group
        self._shards = shards
        # Elements of a rank's part. The last parts may own fewer, which the padding makes up for: all of it
        # is then at the end of what a gather gives.
        self._sizes = {name: sum(span.num_elements for span in layouts[name].spans((0,))) for name in shards}
        sizes = {name: self._sizes[name] * shards[name].element_size() for name in shards}
        self._buckets = make_buckets(sizes, max_bytes=BUCKET_BYTES[group.device.type])
        self._storage: dict[str, torch.Tensor] = {}

    def fill(self) -> nn.Module:
        """Gather the shards into the model and return it, the same model at every call; a collective."""
        self.allocate()
        for bucket in self._buckets:
            self._gather(bucket)
        return self._model

    def allocate(self) -> None:
        """Allocate the storage, if it is not there yet."""
        if self._storage:
            return
        storage, views = {}, {}
        for name, parameter in self._model.named_parameters():
            # Padded at its end, so that a gather needs no copy.
            flat = torch.empty(
                self._sizes[name] * self._group.world_size,
                dtype=self._shards[name].dtype,
                device=self._group.device,
            )
            storage[name] = flat
            views[name] = flat[: parameter.numel()].view(parameter.shape)
        fill_parameters(self._model, views)
        self._model.to(self._group.device)
        self._storage = storage

    def free(self) -> None:
        """Free the storage; the next use allocates it again, at other addresses."""
        parameters = self._model.named_parameters()
        fill_parameters(self._model, {name: tensor.to("meta") for name, tensor in parameters})
        self._storage = {}

    def _gather(self, names: list[str]) -> None:
        """Gather parameters in one collective: small ones cost a collective's latency, not its bandwidth."""
        sizes = [self._sizes[name] for name in names]
        local = [padded(self._shards[name], self._sizes[name]) for name in names]
        if len(names) == 1:
            self._group.gather_tensor(local[0], self._storage[names[0]])
            return
        sent = torch.cat(local)
        received = sent.new_empty(self._group.world_size, sent.numel())
        self._group.gather_tensor(sent, received.view(-1))
        for name, part in zip(names, received.split(sizes, dim=1), strict=True):
            self._storage[name].view(self._group.world_size, -1).copy_(part)


def padded(part: torch.Tensor, size: int) -> torch.Tensor:
    """Return the first ``size`` elements of a flat tensor as a view, or a copy filled up with zeros."""
    if part.numel() >= size:
        return part[:size]
    longer = part.new_zeros(size)
    longer[: part.numel()] = part
    return longer


def make_buckets(sizes: Mapping[str, int], *, max_bytes: int) -> list[list[str]]:
    """Group neighbouring parameters that together fit into a bucket.

    Args:
        sizes: Bytes of each parameter, or of a rank's shard of it, by name.
        max_bytes: Size of a bucket.

    Returns:
        Names by bucket; a larger parameter has a bucket of its own.
    """
    buckets: list[list[str]] = []
    total = 0
    for name, num_bytes in sizes.items():
        if not buckets or total + num_bytes > max_bytes:
            buckets.append([])
            total = 0
        buckets[-1].append(name)
        total += num_bytes
    return buckets
