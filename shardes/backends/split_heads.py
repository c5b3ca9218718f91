"""Parameters with a row for each head, in attention modules whose heads are dealt to ranks.

Plans split the projections of such a module, but not a norm that has other weights for each head: it stays
whole on every rank and does not fit the heads that are left. Its forward takes the rows of this rank's heads.
"""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from shardes.distributed.group import Group


class HeadsPart:
    """Forward of a module of whose parameters, whole on every rank, each rank uses some rows.

    Args:
        module: Module with parameters of shape [heads, ...], in their final storage.
        group: Ranks that share the heads.

    Attributes:
        heads: Slice of the heads that this rank computes.
    """

    def __init__(self, module: nn.Module, group: Group) -> None:
        (num_heads,) = {len(parameter) for parameter in module.parameters(recurse=False)}
        size = num_heads // group.world_size
        self.heads = slice(group.rank * size, (group.rank + 1) * size)
        self._part = copy.copy(module)  # shares all but the dictionary of parameters
        self._part._parameters = {
            key: None if each is None else nn.Parameter(each[self.heads], requires_grad=False)
            for key, each in module._parameters.items()
        }

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the module's outputs for this rank's heads, of shape [..., heads, features]."""
        outputs: torch.Tensor = type(self._part).forward(self._part, inputs)
        return outputs


def norms_of_heads(model: nn.Module, plan: Mapping[str, str]) -> list[str]:
    """Return the norms that have a row of weights for each head of projections that a plan deals to ranks.

    Args:
        model: Model before it is split.
        plan: Styles by the names of modules and parameters.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = {config.num_attention_heads, getattr(config, "num_key_value_heads", None)}
    found = []
    for name, style in plan.items():
        attention, _, kind = name.rpartition(".")
        norm = f"{attention}.{kind.removesuffix('_proj')}_norm"
        if style != "colwise" or kind not in ("q_proj", "k_proj") or norm in found:
            continue
        module = model.get_submodule(attention)._modules.get(norm.rpartition(".")[2])
        if module is not None and [p.ndim for p in module.parameters()] == [2]:
            (weight,) = module.parameters()
            if len(weight) in heads:
                found.append(norm)
    return found


def use_rows_of_heads(model: nn.Module, norms: list[str], *, group: Group) -> None:
    """Make norms compute with the rows of this rank's heads.

    Args:
        model: Model whose parameters are in their final storage.
        norms: Return value of ``norms_of_heads``.
        group: Ranks that share the heads.
    """
    for name in norms:
        module = model.get_submodule(name)
        module.forward = HeadsPart(module, group)
