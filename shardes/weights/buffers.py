"""Tensors laid out like a rank's shards: the masters and the optimizer's states."""

from collections.abc import Sequence

import torch

from shardes.backends.shard import Shard, ShardSpan
from shardes.weights.pinned import pinned_zeros


def buffer_name(shard: Shard, state: str | None) -> str:
    """Return the name in snapshots of a shard's master, or of its optimizer state ``state``."""
    return shard.name if state is None else f"{shard.name}#{state}"


class ShardedBuffers:
    """One flat tensor for each shard, on the shard's device or in pinned host memory.

    Tensors in host memory pass through the device in parts.

    Args:
        shards: Shards whose layout the tensors have.
        dtype: Dtype of the tensors.
        device: Device that computes with them.
        on_host: Whether they are kept in pinned host memory although ``device`` is another.
        part_elements: Most elements of a part that passes through the device; None: they do not pass.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_host: bool,
        part_elements: int | None,
    ) -> None:
        if on_host:
            self.tensors = pinned_zeros({shard.name: shard.local.numel() for shard in shards}, dtype=dtype)
        else:
            self.tensors = {shard.name: torch.zeros_like(shard.local, dtype=dtype) for shard in shards}
        self._passing = torch.empty(part_elements, dtype=dtype, device=device) if part_elements else None

    def view(self, shard: Shard, span: ShardSpan) -> torch.Tensor:
        """Return the view of a span's elements in the memory where they are kept."""
        return span.of(self.tensors[shard.name])

    def on_device(self, shard: Shard, span: ShardSpan) -> torch.Tensor:
        """Return a span's elements on the device: a view, or a copy that lasts until the next call."""
        view = self.view(shard, span)
        if self._passing is None:
            return view
        return self._passing[: span.num_elements].copy_(view, non_blocking=True)

    def write_back(self, shard: Shard, span: ShardSpan) -> None:
        """Copy a span's elements that ``on_device`` returned back to host memory, if they are a copy."""
        if self._passing is not None:
            self.view(shard, span).copy_(self._passing[: span.num_elements], non_blocking=True)
