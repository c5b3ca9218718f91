"""Sizes of what a rank would hold and gather, from shapes alone: no backend is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from shardes.backends.gathered_model import BUCKET_BYTES, make_buckets


@dataclass(frozen=True)
class RankFootprint:
    """Sizes on the first rank of a replica, which holds no less than any other; elements, padding included.

    Attributes:
        num_ranks: Number of ranks that hold the replica together.
        held: Elements of the working tensor of each parameter, by name.
        gathered: Most elements that a forward of ``sharded_model`` holds in gathered form besides.
        num_collectives: Collectives of a forward of ``sharded_model``.
    """

    num_ranks: int
    held: Mapping[str, int]
    gathered: int = 0
    num_collectives: int = 0

    @property
    def whole(self) -> int:
        """Elements of a gathered model, all of whose parts are as large as the first."""
        return self.num_ranks * sum(self.held.values())

    def gather_buffer_bytes(self, itemsize: int, *, device_type: str) -> int:
        """Compute the bytes of the buffers that gathering the whole model takes temporarily.

        Args:
            itemsize: Bytes of an element.
            device_type: ``cuda`` or ``cpu``, which decides on the size of a bucket.
        """
        sizes = {name: size * itemsize for name, size in self.held.items()}
        buckets = make_buckets(sizes, max_bytes=BUCKET_BYTES[device_type])
        of_buckets = [sum(self.held[name] for name in bucket) for bucket in buckets if len(bucket) > 1]
        return (1 + self.num_ranks) * max(of_buckets, default=0) * itemsize


def parameter_sizes(model: nn.Module) -> dict[str, int]:
    """Return the number of elements of each parameter, by name."""
    return {name: math.prod(parameter.shape) for name, parameter in model.named_parameters()}
