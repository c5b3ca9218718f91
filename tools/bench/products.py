"""Record the matrix products of forwards, to compute them again with nothing in between."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LINEAR = ("aten::mm", "aten::addmm", "aten::bmm")
_ATTENTION = "aten::_scaled_dot_product"


class Products(TorchDispatchMode):
    """Recorder of matrix products: the weights themselves, and the shapes of everything else.

    Attributes:
        linear: Operands of products with weights, in their order.
        attention: Operands of the two products of attention, all heads at once.
        flops: Floating-point operations of all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.attention: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.flops = 0
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name in _LINEAR:
            rows, weight = args[-2:]
            self._add(self.linear, self._like(rows), weight)
        elif name.startswith(_ATTENTION):
            query, key, value = args[:3]
            # Query heads that share a key and value head are rows of one product.
            batch, num_heads, head_size = key.shape[0], key.shape[1], query.shape[-1]
            grouped = query.reshape(batch, num_heads, -1, head_size)
            scores = query.new_empty(*grouped.shape[:-1], key.shape[-2])
            for left, right in ((grouped, key.transpose(-1, -2)), (scores, value)):
                self._add(self.attention, self._like(left.flatten(0, 1)), self._like(right.flatten(0, 1)))
        return function(*args, **(kwargs or {}))

    def _add(self, pairs: list[Any], left: torch.Tensor, right: torch.Tensor) -> None:
        pairs.append((left, right))
        self.flops += 2 * left.numel() * right.shape[-1]

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape, strides and dtype, which others of these share."""
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._made:
            made = torch.empty_strided(*key[:2], dtype=tensor.dtype)
            self._made[key] = made.fill_(0.01)
        return self._made[key]

    def compute_linear(self) -> None:
        """Compute the products with weights, in their order."""
        for left, right in self.linear:
            torch.mm(left, right)

    def compute_attention(self) -> None:
        """Compute the products of attention, in their order."""
        for left, right in self.attention:
            torch.bmm(left, right)
