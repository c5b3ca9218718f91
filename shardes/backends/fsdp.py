"""PyTorch FSDP2: each rank holds the rows of every parameter that ``fully_shard`` assigns to it.

Rows are dealt in equal chunks, so the last ranks may hold fewer or none. Every module that is sharded on its
own is gathered when its forward begins and freed when it ends. FSDP2 leaves the root gathered after a forward
by default, and a forward reads gathered parameters without noticing that the shard underneath was written;
``commit`` frees whatever is still gathered.
"""

import copy
import math

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardes.backends.dtensors import layouts_of, local_tensors, make_device_mesh
from shardes.backends.footprint import RankFootprint
from shardes.backends.layout import chunk
from shardes.backends.sharded import GatheringBackend
from shardes.distributed.group import Group


class FsdpBackend(GatheringBackend):
    """A model sharded by FSDP2.

    Args:
        skeleton: Model with parameters on meta and real buffers; it becomes the replica of ``gathered``.
        group: Ranks to shard over; a process group exists even if there is only one.
    """

    name = "fsdp"

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        super().__init__(skeleton, group=group)
        model = copy.deepcopy(skeleton).requires_grad_(False)
        mesh = make_device_mesh(group, axis="shard")
        for module in units(model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            module.register_forward_pre_hook(_gather, prepend=True)
        # Buffers are real and move; parameters are on meta, and only this rank's rows get storage.
        model._apply(lambda t: torch.zeros_like(t, device=group.device) if t.is_meta else t.to(group.device))
        model.tie_weights()
        self.sharded_model = model
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        # Taken before the first forward: while a module is gathered, its parameters are plain tensors.
        self._parameters = dict(sorted(model.named_parameters()))
        self._check_layout(skeleton)
        layouts = layouts_of(self._parameters.items(), world_size=group.world_size)
        self._hold(skeleton, local=local_tensors(self._parameters), layouts=layouts)

    @staticmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute the elements that the first of ``num_ranks`` ranks holds: rows in equal chunks."""
        parameters = list(skeleton.named_parameters())
        held = {name: chunk(len(p), num_ranks, 0)[1] * math.prod(p.shape[1:]) for name, p in parameters}
        names = {id(p): name for name, p in parameters}
        *inner, root = [
            num_ranks * sum(held[names.pop(id(p))] for p in unit.parameters() if id(p) in names)
            for unit in units(skeleton)
        ]
        # A unit and the buffer that it is gathered through, besides what stays for the whole forward.
        gathered = max(2 * root, root + 2 * max(inner, default=0))
        return RankFootprint(num_ranks, held, gathered, num_collectives=len(inner) + 1)

    def _check_layout(self, skeleton: nn.Module) -> None:
        """Check that ties were kept and that every parameter was sharded.

        Raises:
            RuntimeError: The model lost a tie, or a parameter was left whole.
        """
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        if shapes != {name: parameter.shape for name, parameter in self._parameters.items()}:
            raise RuntimeError("sharding changed which parameters the model has")
        whole = [name for name, parameter in self._parameters.items() if not isinstance(parameter, DTensor)]
        if whole:
            raise RuntimeError(f"fully_shard left {whole[0]} whole")

    def commit(self) -> None:
        """Free every gathered parameter, so that the next forward gathers the shards anew."""
        for module in self._sharded_modules:
            module.reshard()


def _gather(module: nn.Module, _: object) -> None:
    """Gather a module before FSDP2 does, which frees the gather's buffer at once.

    FSDP2 keeps that buffer until the next module is gathered, to overlap the two. A forward would then need
    three times the largest layer besides the shards instead of twice, and gathering by layers is for models
    that hardly fit.
    """
    assert isinstance(module, FSDPModule)
    module.unshard()


def units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that are gathered and freed as one, inner ones first and the model itself last.

    Blocks are the modules of the list that holds most of the parameters. An embedding and a head of their own
    are units too, because what belongs to the model itself stays gathered for a whole forward; a tied weight
    does stay, since both ends of the forward need it.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=None)
    units = [] if largest is None else list(largest)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = [module for module in ends if module is not None]
    held = [parameter for module in ends for parameter in module.parameters()]
    if len({id(parameter) for parameter in held}) == len(held):
        units += ends
    return [*units, model]
