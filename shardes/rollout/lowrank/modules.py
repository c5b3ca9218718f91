"""Kinds of modules, and ways of changing what one computes."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardes.backends.split_heads import HeadsPart
from shardes.backends.split_linear import LinearPart

Names = dict[str, str]
"""Names of trained parameters in the model, by their names in the module."""

# Norms that take away the mean, in float32, and multiply by the weight alone.
_COHERE_NORM = re.compile(r"Cohere\w*LayerNorm")


class AddToFunction(TorchFunctionMode):
    """Context in which results of a function of torch have terms added to them.

    Args:
        function: Function of torch.
        add: Function of its positional arguments and its result that returns the new result.
    """

    def __init__(
        self, function: Callable[..., Any], add: Callable[[tuple[Any, ...], torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self._function = function
        self._add = add

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return self._add(args, out) if function is self._function else out


def hooked(change: Callable[..., torch.Tensor], module: nn.Module, names: Names) -> Callable[[], None]:
    """Change the outputs of a module by a forward hook; return the function that removes it."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        return change(module, arguments[0], out, names)

    return module.register_forward_hook(hook).remove


def replaced(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace the forward of a module, but not the hooks around it; return the function that undoes it."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


def adding(
    module: Any,
    function: Callable[..., Any],
    add: Callable[[tuple[Any, ...], torch.Tensor], torch.Tensor],
) -> Callable[[], None]:
    """Add terms to results of a function of torch that a module's forward calls; return what undoes it."""
    forward = module.forward

    def moved(*arguments: Any, **named: Any) -> Any:
        with AddToFunction(function, add):
            return forward(*arguments, **named)

    return replaced(module, moved)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class."""
    return type(module).__name__


def linear_part_of(module: nn.Module) -> LinearPart | None:
    """Return this rank's part of a split linear layer; None if the module is no such layer."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, LinearPart) else None


def heads_of(module: nn.Module) -> slice:
    """Return the heads that this rank computes of a module with a row of a parameter for each."""
    forward = module.__dict__.get("forward")
    return forward.heads if isinstance(forward, HeadsPart) else slice(None)


def norm_epsilon(module: Any) -> Any:
    """Return the epsilon of an RMS norm, by either of its usual names; None if it has neither."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def is_plain_experts(module: Any) -> bool:
    """Return True for experts of the usual form: gate and up joined, not transposed, without biases."""
    return (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes ``x W^T + b``: torch's, or Falcon's, which rounds before the bias."""
    forward = type(module).forward
    return forward is nn.Linear.forward or (
        isinstance(module, nn.Linear) and class_name(module) == "FalconLinear"
    )


def is_layer_norm(module: nn.Module) -> bool:
    """Return whether a module is a layer norm: torch's, or Nemotron's, which adds 1 to the weight."""
    return type(module).forward is nn.LayerNorm.forward or class_name(module) == "NemotronLayerNorm1P"


def is_cohere_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm of Cohere's, with weights for all features or for all heads."""
    has_epsilon = norm_epsilon(module) is not None
    return (
        bool(_COHERE_NORM.fullmatch(class_name(module)))
        and has_epsilon
        and set(module._parameters) == {"weight"}
    )
