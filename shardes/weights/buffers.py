"""Tensors laid out like a rank's shards: the masters, and what an optimizer keeps."""

from collections.abc import Sequence

import torch

from shardes.backends.shard import Shard, ShardSpan


class ShardedBuffers:
    """One flat tensor for each shard, on the shard's device, or in pinned host memory.

    Those in host memory pass through the device in parts.

    Args:
        shards: What they are laid out like.
        dtype: Theirs.
        device: Where they are computed with.
        on_host: Whether they are kept in host memory although the device is another.
        part_elements: The most elements of a part, if they pass in parts.
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
        self.tensors = {
            shard.name: torch.zeros(
                shard.local.shape,
                dtype=dtype,
                device="cpu" if on_host else shard.local.device,
                pin_memory=on_host,
            )
            for shard in shards
        }
        self._passing = torch.empty(part_elements, dtype=dtype, device=device) if part_elements else None

    def view(self, shard: Shard, span: ShardSpan) -> torch.Tensor:
        """A run's elements where they are kept."""
        return span.of(self.tensors[shard.name])

    def on_device(self, shard: Shard, span: ShardSpan) -> torch.Tensor:
        """A run's elements on the device: themselves, or a copy that lasts until the next call."""
        view = self.view(shard, span)
        if self._passing is None:
            return view
        return self._passing[: span.num_elements].copy_(view, non_blocking=True)

    def write_back(self, shard: Shard, span: ShardSpan) -> None:
        """Keeps what became of the copy that ``on_device`` gave, if it is one."""
        if self._passing is not None:
            self.view(shard, span).copy_(self._passing[: span.num_elements], non_blocking=True)
