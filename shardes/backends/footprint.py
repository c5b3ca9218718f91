"""What a rank would hold and gather with each engine, from shapes alone: no engine, no other rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from shardes.backends.gathered_model import make_buckets
from shardes.backends.layout import chunk
from shardes.models.build import largest_layer

BackendName = Literal["zero3", "fsdp", "tensor_parallel", "single"]


@dataclass(frozen=True)
class RankFootprint:
    """What the first rank of a replica has, which has no less than any other; elements, padding included.

    Attributes:
        num_ranks: The ranks that hold the replica.
        held: Of each parameter, by name: its working tensor.
        gathered: The most that a forward of the engine's own model holds besides, gathered.
    """

    num_ranks: int
    held: Mapping[str, int]
    gathered: int

    @property
    def whole(self) -> int:
        """Elements of a gathered model, all of whose parts are as large as the first."""
        return self.num_ranks * sum(self.held.values())

    def gather_buffer_bytes(self, itemsize: int, *, device_type: str) -> int:
        """What gathering the whole model takes for the moment, in elements of so many bytes."""
        sizes = {name: size * itemsize for name, size in self.held.items()}
        buckets = make_buckets(sizes, device_type=device_type)
        of_buckets = [sum(self.held[name] for name in bucket) for bucket in buckets if len(bucket) > 1]
        return (1 + self.num_ranks) * max(of_buckets, default=0) * itemsize


class ShardingPlan:
    """How an engine spreads a model over any number of ranks.

    Args:
        skeleton: The model; its parameters may be on meta.
        backend: The engine.
    """

    def __init__(self, skeleton: PreTrainedModel, *, backend: BackendName) -> None:
        self._skeleton = skeleton
        self._backend = backend
        self._shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        self._units = _names_of_units(skeleton) if backend == "fsdp" else []
        self._found: dict[int, RankFootprint] = {}

    def over(self, num_ranks: int) -> RankFootprint:
        """What a rank has if so many hold the model together; with ``single``, each of them holds all of it.

        Raises:
            UserError: So many ranks cannot split the model.
        """
        if num_ranks not in self._found:
            self._found[num_ranks] = self._over(num_ranks)
        return self._found[num_ranks]

    def _over(self, num_ranks: int) -> RankFootprint:
        shapes = self._shapes.items()
        if self._backend == "single":
            return RankFootprint(num_ranks, {name: math.prod(shape) for name, shape in shapes}, 0)
        if self._backend == "tensor_parallel":
            from shardes.backends.tensor_parallel import planned_layouts

            layouts = planned_layouts(self._skeleton, num_ranks=num_ranks)
            spans = {name: layouts[name].spans((0,)) for name in self._shapes}
            return RankFootprint(
                num_ranks, {name: sum(span.num_elements for span in spans[name]) for name in spans}, 0
            )
        if self._backend == "fsdp":
            held = {name: chunk(shape[0], num_ranks, 0)[1] * math.prod(shape[1:]) for name, shape in shapes}
            *inner, root = [num_ranks * sum(held[name] for name in names) for names in self._units]
            # A unit and the buffer that it is gathered through, besides what stays for the whole forward.
            return RankFootprint(num_ranks, held, max(2 * root, root + 2 * max(inner, default=0)))
        held = {name: chunk(math.prod(shape), num_ranks, 0)[1] for name, shape in shapes}
        # What DeepSpeed is told (deepspeed_config.py).
        return RankFootprint(num_ranks, held, 2 * largest_layer(self._skeleton))


def _names_of_units(skeleton: PreTrainedModel) -> list[list[str]]:
    """The parameters that FSDP2 gathers as one, those that the model itself has the last."""
    from shardes.backends.fsdp import units

    names = {id(parameter): name for name, parameter in skeleton.named_parameters()}
    return [
        [name for parameter in unit.parameters() if (name := names.pop(id(parameter), None)) is not None]
        for unit in units(skeleton)
    ]
