"""Optimizers that turn the ES gradient into steps: plain steps, momentum, Adam.

Every operation is elementwise, so each shard computes its own part, and is a single float32 operation in a
fixed order, rounded once: no fused multiply-add, no division by a number, which some devices turn into
another operation. A replay therefore gives the same bits, whatever the sharding.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor


class Optimizer(ABC):
    """Rule that turns gradients into steps.

    Attributes:
        state_names: Names of its states, each one float32 number a weight, zero at first.
        steps_are_gradients: Whether a step is the gradient itself, so that there is no state.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    steps_are_gradients: ClassVar[bool] = False

    def gradient_scale(self, alpha: float) -> float:
        """Return the factor of the gradient's coefficients at step size ``alpha``."""
        return alpha

    @abstractmethod
    def step(self, gradient: Tensor, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor:
        """Compute the step that is added to some weights: float32, like ``gradient``.

        Args:
            gradient: Gradient of the weights, float32; may be overwritten.
            states: States of the same weights in the order of ``state_names``; changed in place.
            alpha: Step size.
            number: Number of steps before this one.
        """

    def last_step(self, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor | None:
        """Compute the step that led to some states; None if they do not determine it.

        Args:
            states: States after the step; not written.
            alpha: Step size of the step.
            number: Number of steps before it.
        """
        return None

    @abstractmethod
    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """Return an upper bound of a step's magnitude, given bounds of the gradient's and the states'."""


class PlainStep(Optimizer):
    """Plain steps: the step is the gradient (Qiu et al. 2025, Algorithm 1)."""

    steps_are_gradients = True

    def step(self, gradient: Tensor, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor:
        """Return the gradient."""
        return gradient

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """Return the gradient's bound."""
        return gradient


@dataclass(frozen=True)
class Momentum(Optimizer):
    """Heavy-ball momentum (Polyak 1964, Sutskever et al. 2013): the step is ``m <- momentum * m + gradient``.

    The step size is in the gradient, so a schedule changes what is added to m, and not m.

    Attributes:
        momentum: Factor of m in every step; below 1.
    """

    momentum: float
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def step(self, gradient: Tensor, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor:
        """Update m and return it."""
        (momentum,) = states
        return momentum.mul_(self.momentum).add_(gradient)

    def last_step(self, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor | None:
        """Return m, which was the step."""
        return states[0]

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """Return the bound for a gradient in m's direction."""
        return self.momentum * states[0] + gradient


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, Algorithm 1) on the ES gradient; with weight decay it is AdamW.

    Its steps do not depend on the gradient's length, so alpha is a factor of the step and not of the
    gradient.

    Attributes:
        betas: Decay factors of the first and the second moment.
        epsilon: Number added to the root of the second moment.
    """

    betas: tuple[float, float]
    epsilon: float
    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def gradient_scale(self, alpha: float) -> float:
        """Return 1: alpha is a factor of the step."""
        return 1.0

    def step(self, gradient: Tensor, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor:
        """Update the moments and compute the step from them."""
        first, second = states
        first.mul_(self.betas[0]).add_(gradient * (1 - self.betas[0]))
        second.mul_(self.betas[1]).add_(gradient.square_().mul_(1 - self.betas[1]))
        return self._step(first, second, alpha=alpha, number=number)

    def last_step(self, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor | None:
        """Compute the step from the moments again."""
        first, second = states
        return self._step(first, second, alpha=alpha, number=number)

    def _step(self, first: Tensor, second: Tensor, *, alpha: float, number: int) -> Tensor:
        rescale = [float(np.float32(1 / (1 - beta ** (number + 1)))) for beta in self.betas]
        root = (second * rescale[1]).sqrt_().add_(self.epsilon)
        return (first * rescale[0]).div_(root).mul_(alpha)

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """Return the bound from the Cauchy-Schwarz inequality over the moments' sums, for any gradients."""
        first, second = self.betas
        return alpha / ((1 - second) * (1 - first**2 / second)) ** 0.5


@dataclass(frozen=True)
class Decay:
    """Weight decay, decoupled from the gradient (Loshchilov and Hutter 2019).

    Attributes:
        rate: Rate of the decay: an update removes ``alpha * rate`` of the distance.
        is_anchored: Whether weights decay towards the base model; otherwise towards 0.
    """

    rate: float
    is_anchored: bool
