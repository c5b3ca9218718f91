"""Linear layers of which each rank computes a part, on plain tensors.

transformers applies its plans through DTensors and a wrapper around every layer. Nothing is differentiated
here, so the most frequent layers need neither: a product with the rank's own part of the weight, and where
the plan says so one collective.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from shardes.distributed.group import Group

Terms = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the inputs and outputs of a product to outputs with something added that is linear in the inputs."""


class LinearPart:
    """The forward of a linear layer of which this rank has a part.

    Args:
        module: The layer, with this rank's part of its weight.
        style: The plan's.
        group: The ranks.
        held: The layer's parameters as they were before it had parts of them: another module may share them.

    Attributes:
        held: The same.
        outputs: Which of the layer's outputs this rank computes.
        inputs: From which of its inputs.
        is_sum: Whether what ranks compute is added up; the bias then comes last.
        terms: Added to this rank's product; None: nothing.
    """

    def __init__(
        self,
        module: nn.Linear,
        style: str,
        group: Group,
        *,
        held: Mapping[str, nn.Parameter | None],
    ) -> None:
        self.held = held
        self._module = module
        self._forward = _FORWARDS[style]
        self.group = group
        rows, columns = module.weight.shape
        self.is_sum = self._forward in (_rows, _rows_of_all)
        # Ranks hold equally many, but for the last ones, which may hold fewer.
        size = module.in_features if self.is_sum else module.out_features
        first = group.rank * -(-size // group.world_size)
        self.outputs = slice(None) if self.is_sum else slice(first, first + rows)
        self.inputs = slice(first, first + columns) if self.is_sum else slice(None)
        self.terms: Terms | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """All outputs, or those of this rank, as the style says."""
        return self._forward(self, self._module, inputs)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """With this rank's part of the weight."""
        out = functional.linear(inputs, self._module.weight, bias)
        return out if self.terms is None else self.terms(inputs, out)


def _columns(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """This rank's part of the outputs."""
    return part.product(inputs, module.bias)


def _gathered_columns(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, of which each rank computes a part."""
    mine = _columns(part, module, inputs)
    size = -(-module.out_features // part.group.world_size)
    mine = functional.pad(mine, (0, size - mine.shape[-1])).contiguous()
    parts = mine.new_empty(part.group.world_size, *mine.shape)
    part.group.gather_tensor(mine.view(-1), parts.view(-1))
    return parts.movedim(0, -2).flatten(-2)[..., : module.out_features]


def _rows(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, from this rank's part of the inputs."""
    total = part.group.sum_tensor(part.product(inputs))
    return total if module.bias is None else total + module.bias


def _rows_of_all(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs, from all inputs."""
    return _rows(part, module, inputs[..., part.inputs])


_Forward = Callable[[LinearPart, nn.Linear, torch.Tensor], torch.Tensor]
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
        held = dict(module._parameters)
        for key, parameter in held.items():
            if isinstance(parameter, DTensor):
                module._parameters[key] = nn.Parameter(parameter.to_local(), requires_grad=False)
        module.forward = LinearPart(module, style, group, held=held)  # type: ignore[method-assign,assignment]
