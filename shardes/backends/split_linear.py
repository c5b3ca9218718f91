"""Linear layers of which each rank computes a part, on plain tensors.

transformers applies its plans through DTensors and a wrapper around every layer. Nothing is differentiated
here, so the most frequent layers need neither: a product with the rank's own part of the weight, and where
the plan says so one collective.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from shardes.distributed import Group


def _columns(module: nn.Linear, group: Group, inputs: torch.Tensor) -> torch.Tensor:
    """This rank's part of the outputs."""
    return functional.linear(inputs, module.weight, module.bias)


def _gathered_columns(module: nn.Linear, group: Group, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, of which each rank computes a part."""
    part = _columns(module, group, inputs)
    # Ranks hold equally many outputs, but for the last ones, which may hold fewer.
    size = -(-module.out_features // group.world_size)
    part = functional.pad(part, (0, size - part.shape[-1])).contiguous()
    parts = part.new_empty(group.world_size, *part.shape)
    group.gather_tensor(part.view(-1), parts.view(-1))
    return parts.movedim(0, -2).flatten(-2)[..., : module.out_features]


def _rows(module: nn.Linear, group: Group, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, from this rank's part of the inputs."""
    total = group.sum_tensor(functional.linear(inputs, module.weight))
    return total if module.bias is None else total + module.bias


def _rows_of_all(module: nn.Linear, group: Group, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, from all inputs."""
    size = -(-module.in_features // group.world_size)
    return _rows(module, group, inputs[..., group.rank * size : (group.rank + 1) * size])


_Forward = Callable[[nn.Linear, Group, torch.Tensor], torch.Tensor]
_FORWARDS: Mapping[str, _Forward] = {
    "colwise": _columns,
    "colwise_gather_output": _gathered_columns,
    "colwise_rep": _gathered_columns,
    "rowwise": _rows,
    "rowwise_split_input": _rows_of_all,
    "rowwise_rep": _rows_of_all,
}


def linears_of(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """The modules of a plan that ``use_plain_tensors`` can do, and their styles.

    Modules that only inherit from ``nn.Linear`` are not among them: what their forwards do is not known here.
    """
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: style for name, style in plan.items() if style in _FORWARDS and name in plain}


def use_plain_tensors(model: nn.Module, linears: Mapping[str, str], *, group: Group) -> None:
    """Makes linear layers compute with their local tensors.

    Args:
        model: A model whose parameters are DTensors as the plan wants them, in their final storage.
        linears: What ``linears_of`` found.
        group: The ranks.
    """
    for name, style in linears.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear), name
        for key, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                module._parameters[key] = nn.Parameter(parameter.to_local(), requires_grad=False)
        module.forward = partial(_FORWARDS[style], module, group)  # type: ignore[method-assign]
