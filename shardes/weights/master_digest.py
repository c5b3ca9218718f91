"""Digests of a rank's masters, optimizer states and exports.

Each function returns one rank's part of a digest; the whole is the sum over ranks modulo 2**64.
"""

import torch

from shardes.errors import UserError
from shardes.models.checkpoint import Checkpoint
from shardes.weights.digest import add_digest
from shardes.weights.master import CHUNK_ELEMENTS, Weights

_LOW_64_BITS = 0xFFFFFFFFFFFFFFFF


def master_digest(weights: Weights, *, is_rounded: bool = False) -> int:
    """Return this rank's part of the weights digest, below 2**64.

    Args:
        weights: The rank's masters.
        is_rounded: Whether the digest is of the centre, which an export holds, instead of the master.
    """
    total = torch.zeros(1, dtype=torch.int64, device=weights.backend.device)
    for shard, region, _, master in weights.on_device():
        if not shard.is_copy:
            values = master.to(weights.backend.dtype) if is_rounded else master
            add_digest(total, values, region=region)
    return (int(total.item()) + weights.frozen_digest) & _LOW_64_BITS


def optimizer_digest(weights: Weights) -> int:
    """Return this rank's part of the digest of the optimizer's states, below 2**64."""
    total = 0
    for number, state in enumerate(weights.state_buffers(), start=1):
        part = torch.zeros(1, dtype=torch.int64, device=weights.backend.device)
        for shard, span in weights.spans(weights.trained):
            if not shard.is_copy:
                add_digest(part, state.on_device(shard, span), region=shard.region(span))
        total += number * int(part.item())
    return total & _LOW_64_BITS


def checkpoint_digest(weights: Weights, checkpoint: Checkpoint) -> int:
    """Return this rank's part of an export's digest: ``master_digest(is_rounded=True)`` for a good export.

    Raises:
        UserError: The checkpoint does not fit the model, or its weights have another dtype.
    """
    backend = weights.backend
    weights.match_checkpoint(checkpoint)
    for name, found in checkpoint.tensors.items():
        for stored, _ in found.places():
            if stored.dtype != backend.dtype:
                raise UserError(f"{name} is stored as {stored.dtype}; wanted {backend.dtype}")
    total = torch.zeros(1, dtype=torch.int64, device=backend.device)
    counted = [shard for shard in backend.shards if not shard.is_copy]
    for shard, part in weights.spans(counted, most_elements=CHUNK_ELEMENTS):
        region = shard.region(part)
        values = torch.empty(part.num_elements, dtype=backend.dtype, device=backend.device)
        checkpoint.read(shard.name, region=region, out=values)
        add_digest(total, values, region=region)
    return int(total.item()) & _LOW_64_BITS
