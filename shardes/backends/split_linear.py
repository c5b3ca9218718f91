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
"""Function of a product's inputs and outputs that returns the outputs plus terms linear in the inputs."""


class LinearPart:
    """Forward of a linear layer of which this rank has a part.

    Args:
        module: Layer with this rank's part of its weight.
        style: Style of the layer in the plan.
        group: Ranks that share the layer.
        held: Whole parameters of the layer by name, as another module may share them.

    Attributes:
        held: Argument ``held``.
        group: Argument ``group``.
        outputs: Slice of the layer's outputs that this rank computes.
        inputs: Slice of the layer's inputs that this rank's product takes.
        is_sum: Whether the ranks' outputs are added up; the bias then comes last.
        terms: Terms that are added to this rank's product; None for none.
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
        """Compute all outputs or this rank's, as the style demands; a collective of most styles.

        Args:
            inputs: All inputs or this rank's, as the style demands, of shape [..., features].
        """
        return self._forward(self, self._module, inputs)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply by this rank's part of the weight, and add ``bias`` and ``terms``."""
        out = functional.linear(inputs, self._module.weight, bias)
        return out if self.terms is None else self.terms(inputs, out)


def _columns(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Compute this rank's part of the outputs."""
    return part.product(inputs, module.bias)


def _gathered_columns(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Compute all outputs, of which each rank computes a part."""
    mine = _columns(part, module, inputs)
    size = -(-module.out_features // part.group.world_size)
    mine = functional.pad(mine, (0, size - mine.shape[-1])).contiguous()
    parts = mine.new_empty(part.group.world_size, *mine.shape)
    part.group.gather_tensor(mine.view(-1), parts.view(-1))
    return parts.movedim(0, -2).flatten(-2)[..., : module.out_features]


def _rows(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Compute all outputs from this rank's part of the inputs."""
    total = part.group.sum_tensor(part.product(inputs))
    return total if module.bias is None else total + module.bias


def _rows_of_all(part: LinearPart, module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Compute all outputs from all inputs."""
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
    """Return the modules of a plan that ``use_plain_tensors`` supports, with their styles.

    Modules that only inherit from ``nn.Linear`` are not among them: their forwards are not known here.
    """
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: style for name, style in plan.items() if style in _FORWARDS and name in plain}


def use_plain_tensors(model: nn.Module, linears: Mapping[str, str], *, group: Group) -> None:
    """Make linear layers compute with their local tensors.

    Args:
        model: Model whose parameters are DTensors as in the plan, in their final storage.
        linears: Return value of ``linears_of``.
        group: Ranks that share the layers.
    """
    for name, style in linears.items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear), name
        held = dict(module._parameters)
        for key, parameter in held.items():
            if isinstance(parameter, DTensor):
                module._parameters[key] = nn.Parameter(parameter.to_local(), requires_grad=False)
        module.forward = LinearPart(module, style, group, held=held)  # type: ignore[method-assign,assignment]
