"""Tensor parallelism by the model's own plan: shards stay where they are and activations are reduced.

transformers knows for each architecture which matrices are split by rows and which by columns. The noise and
the update of a shard are what they are in every other backend, bit for bit; a forward sums partial products
in another order, so logits agree with the other backends to rounding. What the plan does not split (norms,
routers, some biases) is whole on every rank, where the same noise changes it alike.
"""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from shardes.backends.dtensors import layouts_of, local_tensors, make_device_mesh
from shardes.backends.footprint import RankFootprint
from shardes.backends.sharded import ShardedBackend, make_shards
from shardes.backends.split_checks import check_architecture, check_experts, check_forward, check_heads
from shardes.backends.split_heads import norms_of_heads, use_rows_of_heads
from shardes.backends.split_linear import linears_of, use_plain_tensors
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import fill_parameters


class TensorParallelBackend(ShardedBackend):
    """A model split by its tensor parallel plan. It is never whole on any rank.

    Args:
        skeleton: Model with parameters on meta and real buffers.
        group: Ranks to split over; a process group exists even if there is only one.

    Raises:
        UserError: transformers has no plan for the architecture, or the plan cannot take so many ranks.
    """

    name = "tensor_parallel"

    def __init__(self, skeleton: PreTrainedModel, *, group: Group) -> None:
        super().__init__(skeleton, group=group)
        model = copy.deepcopy(skeleton).requires_grad_(False)
        is_split = group.world_size > 1
        linears, norms = _split(model, make_device_mesh(group, axis="tp")) if is_split else ({}, [])
        _allocate(model, group.device)
        self.sharded_model = model
        parameters = dict(sorted(model.named_parameters()))
        if {n: p.shape for n, p in parameters.items()} != {
            n: p.shape for n, p in skeleton.named_parameters()
        }:
            raise RuntimeError("splitting changed which parameters the model has")
        self._layouts = layouts_of(parameters.items(), world_size=group.world_size)
        local = local_tensors(parameters)
        self.shards = make_shards(skeleton, local=local, layouts=self._layouts, group=group)
        use_plain_tensors(model, linears, group=group)
        use_rows_of_heads(model, norms, group=group)
        if is_split:
            check_forward(model, num_ranks=group.world_size, device=group.device)

    @staticmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute the elements that the first of ``num_ranks`` ranks holds; no process group is needed.

        Raises:
            UserError: transformers has no plan for the architecture, or the plan cannot take so many ranks.
        """
        model = copy.deepcopy(skeleton)
        if num_ranks > 1:
            ranks = torch.arange(num_ranks)
            _split(model, DeviceMesh("cpu", ranks, mesh_dim_names=("tp",), _init_backend=False, _rank=0))
        layouts = layouts_of(model.named_parameters(), world_size=num_ranks).items()
        held = {name: sum(span.num_elements for span in layout.spans((0,))) for name, layout in layouts}
        # After attention and after the neurons of each layer.
        num_reductions = 2 * skeleton.config.get_text_config().num_hidden_layers
        return RankFootprint(num_ranks, held, num_collectives=num_reductions)

    def commit(self) -> None:
        """Do nothing: the shards are the parameters."""

    def gathered(self) -> nn.Module:
        """Return the model if there is only one rank.

        Raises:
            UserError: There are several, which never gather the model.
        """
        if self._group.world_size > 1:
            raise UserError(
                "rollout.gather: parallel.backend: tensor_parallel never gathers the model; set "
                "rollout.gather: layer, or parallel.backend: fsdp"
            )
        return self.sharded_model


def _split(model: PreTrainedModel, mesh: DeviceMesh) -> tuple[dict[str, str], list[str]]:
    """Apply the model's plan: parameters become DTensors, and forwards reduce what they must.

    Returns:
        Names of linear layers whose forwards are still to be changed, with their styles in the plan, and
        names of norms of which each rank is to use its heads' rows.

    Raises:
        UserError: transformers is too old or has no plan for the architecture, or the plan cannot take so
            many ranks.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError:
        raise UserError(
            "parallel.backend: tensor_parallel needs transformers 5.23, whose plans it applies; this is "
            f"{transformers_version}. Upgrade it, or set parallel.backend: fsdp"
        ) from None
    aliases = _untie(model)
    try:
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    except ValueError:
        raise UserError(
            f"parallel.backend: tensor_parallel: transformers has no tensor parallel plan for "
            f"{type(model).__name__}; set parallel.backend: fsdp or zero3"
        ) from None
    check_architecture(model)
    check_heads(model, plan, mesh.size())
    for alias, name in aliases.items():
        if plan.get(name) is None and plan.get(alias) is not None:
            # One tensor cannot be whole in the embedding and split in the head: the head stays whole as well.
            plan = {key: style for key, style in plan.items() if key not in (alias, alias.rpartition(".")[0])}
    linears, norms = linears_of(model, plan), norms_of_heads(model, plan)
    wrapped = {name: style for name, style in plan.items() if name not in linears}
    apply_tensor_parallelism(model, mesh, wrapped)
    check_experts(model, mesh.size())
    _tie(model, aliases)
    return linears, norms


def _untie(model: nn.Module) -> dict[str, str]:
    """Give every name of a tied weight its own parameter, as plans expect; return first names by alias."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            aliases[name] = kept
            module, _, key = name.rpartition(".")
            model.get_submodule(module)._parameters[key] = nn.Parameter(
                torch.empty_like(parameter), requires_grad=False
            )
    return aliases


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Make tied names share one tensor again.

    Args:
        model: Model that ``_untie`` was called with.
        aliases: Return value of ``_untie``.

    Raises:
        RuntimeError: The plan splits the two in different ways.
    """
    for alias, name in aliases.items():
        one, other = model.get_parameter(name), model.get_parameter(alias)
        if getattr(one, "placements", None) != getattr(other, "placements", None):
            raise RuntimeError(f"the plan splits {name} and {alias} differently, but they are tied")
        module, _, key = alias.rpartition(".")
        model.get_submodule(module)._parameters[key] = one


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate the local part of every parameter, zeros; buffers are real already and move to ``device``."""
    fill_parameters(model, {name: _with_storage(held, device) for name, held in model.named_parameters()})
    for module in model.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device)


def _with_storage(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return torch.zeros_like(parameter, device=device)
    return DTensor.from_local(
        torch.zeros(parameter.to_local().shape, dtype=parameter.dtype, device=device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
