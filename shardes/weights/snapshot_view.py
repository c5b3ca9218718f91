"""The tensors of a rank's masters and optimizer states as a snapshot stores them."""

from collections.abc import Iterator

import torch

from shardes.backends.shard import Shard
from shardes.es.update import Update
from shardes.weights.buffers import buffer_name
from shardes.weights.master import Source, Weights


def owned_tensors(weights: Weights) -> Iterator[tuple[str, Shard, torch.Tensor]]:
    """Yield the name, the shard and the tensor of each master and optimizer state that this rank owns.

    A tensor is flat and laid out like its shard. No element is yielded by two ranks.
    """
    states = zip(weights.optimizer.state_names, weights.state_buffers(), strict=True)
    for state, buffers in ((None, weights.masters), *states):
        for shard in weights.trained:
            if shard.spans and not shard.is_copy:
                yield buffer_name(shard, state), shard, buffers.tensors[shard.name]


def load_snapshot(weights: Weights, source: Source, *, last_update: Update) -> None:
    """Read this rank's elements of the masters and of the optimizer's states; no collective.

    The model does not see them before ``Weights.centre``.

    Args:
        weights: Masters to overwrite.
        source: Snapshot that has the tensors under the names of ``owned_tensors``.
        last_update: Update after which the snapshot was taken.
    """
    weights.read_buffers(weights.masters, source)
    for state, buffers in zip(weights.optimizer.state_names, weights.state_buffers(), strict=True):
        weights.read_buffers(buffers, source, state=state)
    weights.last_update = last_update
