"""The centre of a rank's masters as an export stores it: whole parameters under the checkpoint's names."""

import torch

from shardes.backends.shard import Shard
from shardes.weights.master import Weights


def gather_centre(weights: Weights, shard: Shard, *, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """Gather one whole parameter of the centre on rank 0; a collective.

    Args:
        weights: The rank's masters.
        shard: This rank's part of the parameter.
        dtype: Dtype to round the master to; None: the model's.

    Returns:
        The parameter on rank 0; None on the others.
    """
    master, dtype = weights.masters.tensors.get(shard.name), dtype or weights.backend.dtype
    values = shard.local.to(dtype) if master is None else master.to(dtype).to(weights.backend.device)
    return weights.backend.gather_parameter(shard, values)


def stored_as(weights: Weights, shard: Shard) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the base model's file tensors that make up a parameter, in its order."""
    return [(shard.name, shard.shape)] if weights.base is None else weights.base.pieces_of(shard.name)
