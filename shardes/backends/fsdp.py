"""PyTorch FSDP2: each rank holds the rows of every parameter that ``fully_shard`` gives it.

Rows are dealt in equal chunks, so the last ranks may hold fewer or none. Every module that is sharded on its
own is gathered when its forward begins and freed when it ends. FSDP2 leaves the root gathered after a forward
by default, and a forward reads gathered parameters without noticing that the shard underneath was written;
``commit`` frees whatever is still gathered.
"""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardes.backends.dtensors import layout_of, local_of, make_device_mesh
from shardes.backends.sharded import GatheringBackend
from shardes.distributed.group import Group


class FsdpBackend(GatheringBackend):
    """A model sharded by FSDP2.

    Args:
        skeleton: The model, parameters on meta, buffers real; it becomes the replica of ``gathered``.
        group: The ranks; a process group exists even if there is only one.
    """

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
        layouts = {
            name: layout_of(parameter, world_size=group.world_size)
            for name, parameter in self._parameters.items()
        }
        self._hold(
            skeleton,
            local={name: local_of(parameter) for name, parameter in self._parameters.items()},
            layouts=layouts,
            shapes={name: layout.shape for name, layout in layouts.items()},
        )

    def _check_layout(self, skeleton: nn.Module) -> None:
        """Stops if the model lost a tie, or if a parameter was left whole."""
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        if shapes != {name: parameter.shape for name, parameter in self._parameters.items()}:
            raise RuntimeError("sharding changed which parameters the model has")
        whole = [name for name, parameter in self._parameters.items() if not isinstance(parameter, DTensor)]
        if whole:
            raise RuntimeError(f"fully_shard left {whole[0]} whole")

    def commit(self) -> None:
        """Frees every gathered parameter, so that the next forward gathers the shards anew."""
        for module in self._sharded_modules:
            module.reshard()


def _gather(module: nn.Module, _: object) -> None:
    """Gathers a module before FSDP2 does, and with it frees the gather's buffer at once.

    FSDP2 keeps that buffer until the next module is gathered, to overlap the two. A forward would then need
    three times the largest layer besides the shards instead of twice, and streaming is for models that hardly
    fit.
    """
    assert isinstance(module, FSDPModule)
    module.unshard()


def units(model: PreTrainedModel) -> list[nn.Module]:
    """What is gathered and freed as one, inner modules first; the model itself takes what is left.

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
