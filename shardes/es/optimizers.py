"""What becomes of the ES gradient: plain steps, momentum, Adam.

All of it is elementwise, so every shard does its own, and written as single float32 operations in a fixed
order, each rounded once: no fused multiply-add, no division by a number, which some devices turn into another
operation. So a replay gives the same bits, and no sharding changes one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch


class Optimizer(ABC):
    """Turns gradients into steps.

    Attributes:
        state_names: What it keeps for each weight, a float32 tensor each, zero at first.
        steps_are_gradients: Whether a step is the gradient itself, so that nothing has to be kept.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    steps_are_gradients: ClassVar[bool] = False

    def gradient_scale(self, alpha: float) -> float:
        """What the gradient's coefficients are multiplied by at a step size."""
        return alpha

    @abstractmethod
    def step(
        self, gradient: torch.Tensor, states: Sequence[torch.Tensor], *, alpha: float, number: int
    ) -> torch.Tensor:
        """What is added to some weights.

        Args:
            gradient: float32; may be written over.
            states: In the order of ``state_names``, for the same weights; changed in place.
            alpha: The step size.
            number: How many steps there were before.
        """

    @abstractmethod
    def last_step(self, states: Sequence[torch.Tensor], *, alpha: float, number: int) -> torch.Tensor | None:
        """The step that led to some states; None if they do not tell.

        Args:
            states: They are not written.
            alpha: The step size of that step.
            number: How many steps there were before it.
        """

    @abstractmethod
    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """What no step exceeds in magnitude, if the gradient and the states do not exceed these."""


class PlainStep(Optimizer):
    """The step is the gradient (Qiu et al. 2025, Algorithm 1)."""

    steps_are_gradients = True

    def step(
        self, gradient: torch.Tensor, states: Sequence[torch.Tensor], *, alpha: float, number: int
    ) -> torch.Tensor:
        """As in the base class."""
        return gradient

    def last_step(self, states: Sequence[torch.Tensor], *, alpha: float, number: int) -> torch.Tensor | None:
        """Nothing is kept."""
        return None

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """The gradient's."""
        return gradient


@dataclass(frozen=True)
class Momentum(Optimizer):
    """``m <- momentum * m + gradient``, and the step is m (heavy ball: Polyak 1964, Sutskever et al. 2013).

    The step size is in the gradient, so a schedule changes what is added to m, and not m.

    Attributes:
        momentum: What is left of m after a step; below 1.
    """

    momentum: float
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def step(
        self, gradient: torch.Tensor, states: Sequence[torch.Tensor], *, alpha: float, number: int
    ) -> torch.Tensor:
        """As in the base class."""
        (kept,) = states
        return kept.mul_(self.momentum).add_(gradient)

    def last_step(self, states: Sequence[torch.Tensor], *, alpha: float, number: int) -> torch.Tensor | None:
        """The state itself."""
        return states[0]

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """All in one direction."""
        return self.momentum * states[0] + gradient


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, Algorithm 1) on the ES gradient; with weight decay it is AdamW.

    Its steps do not depend on the gradient's length, so alpha is a factor of the step and not of the
    gradient.

    Attributes:
        betas: What is left of the two moments after a step.
        epsilon: Added to the root of the second.
    """

    betas: tuple[float, float]
    epsilon: float
    state_names: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def gradient_scale(self, alpha: float) -> float:
        """None."""
        return 1.0

    def step(
        self, gradient: torch.Tensor, states: Sequence[torch.Tensor], *, alpha: float, number: int
    ) -> torch.Tensor:
        """As in the base class."""
        first, second = states
        first.mul_(self.betas[0]).add_(gradient * (1 - self.betas[0]))
        second.mul_(self.betas[1]).add_(gradient.square_().mul_(1 - self.betas[1]))
        return self._step(first, second, alpha=alpha, number=number)

    def last_step(self, states: Sequence[torch.Tensor], *, alpha: float, number: int) -> torch.Tensor | None:
        """Computed again."""
        first, second = states
        return self._step(first, second, alpha=alpha, number=number)

    def _step(self, first: torch.Tensor, second: torch.Tensor, *, alpha: float, number: int) -> torch.Tensor:
        rescale = [float(np.float32(1 / (1 - beta ** (number + 1)))) for beta in self.betas]
        root = (second * rescale[1]).sqrt_().add_(self.epsilon)
        return (first * rescale[0]).div_(root).mul_(alpha)

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """By the inequality of Cauchy and Schwarz over the moments' sums, whatever the gradients were."""
        first, second = self.betas
        return alpha / ((1 - second) * (1 - first**2 / second)) ** 0.5


@dataclass(frozen=True)
class Decay:
    """A pull on the weights in every update, apart from the gradient (Loshchilov and Hutter 2019).

    Attributes:
        rate: ``alpha * rate`` of the distance is taken away.
        is_anchored: Whether the pull is towards the base model, and not towards 0.
    """

    rate: float
    is_anchored: bool
