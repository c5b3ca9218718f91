"""Optimizers that turn the ES gradient into steps: plain steps, momentum, Adam.

docs/updates.md has the same in words; a changed bit is a new ``UPDATE_VERSION``, see ``update``.
Every operation is elementwise, so each shard computes its own part, and is one of those that ``arithmetic``
lists, in a fixed order. A replay therefore gives the same bits, whatever the sharding and the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from shardes.es.arithmetic import power, rounded, sqrt


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
        return momentum.mul_(rounded(self.momentum)).add_(gradient)

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
        keep_first, keep_second = self.betas
        first.mul_(rounded(keep_first)).add_(gradient * rounded(1 - keep_first))
        second.mul_(rounded(keep_second)).add_(gradient.mul_(gradient).mul_(rounded(1 - keep_second)))
        return self._step(first, second, alpha=alpha, number=number)

    def last_step(self, states: Sequence[Tensor], *, alpha: float, number: int) -> Tensor | None:
        """Compute the step from the moments again."""
        first, second = states
        return self._step(first, second, alpha=alpha, number=number)

    def _step(self, first: Tensor, second: Tensor, *, alpha: float, number: int) -> Tensor:
        rescale_first, rescale_second = (rounded(self._rescale(beta, number + 1)) for beta in self.betas)
        root = self._sqrt(second * rescale_second).add_(rounded(self.epsilon))
        return (first * rescale_first).div_(root).mul_(rounded(alpha))

    def _rescale(self, beta: float, num_steps: int) -> float:
        """Return what a moment is multiplied by, so that its weights of all gradients so far add up to 1."""
        return 1 / (1 - power(beta, num_steps))

    def _sqrt(self, values: Tensor) -> Tensor:
        return sqrt(values)

    def largest_step(self, gradient: float, states: Sequence[float], *, alpha: float) -> float:
        """Return the bound from the Cauchy-Schwarz inequality over the moments' sums, for any gradients."""
        first, second = self.betas
        return alpha / ((1 - second) * (1 - first**2 / second)) ** 0.5


class AdamVersion1(Adam):
    """Adam as it was in version 1, for journals that were begun with it.

    Its square root is torch's, and its powers are the C library's. Neither is correctly rounded everywhere,
    so its last bits depend on the processor and on the libraries.
    """

    def _rescale(self, beta: float, num_steps: int) -> float:
        return 1 / (1 - beta**num_steps)

    def _sqrt(self, values: Tensor) -> Tensor:
        return values.sqrt_()


@dataclass(frozen=True)
class Decay:
    """Weight decay, decoupled from the gradient (Loshchilov and Hutter 2019).

    Attributes:
        rate: Rate of the decay: an update removes ``alpha * rate`` of the distance.
        is_anchored: Whether weights decay towards the base model; otherwise towards 0.
    """

    rate: float
    is_anchored: bool

    def added(self, step: Tensor, *, master: Tensor, base: Tensor | None, alpha: float) -> Tensor:
        """Return a step with the decay of the weights that it is added to.

        Args:
            step: Step, float32.
            master: The weights, of the master's dtype.
            base: The base model's weights in the same dtype; None unless ``is_anchored``.
            alpha: Step size.
        """
        distance = master.float()
        if self.is_anchored:
            assert base is not None, "the caller reads it"
            distance = distance - base.float()
        return step - distance * rounded(alpha * self.rate)
