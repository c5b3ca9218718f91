"""Updates and perturbations of the weights: all that a replay needs, and no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

# Version of docs/updates.md; a journal's header has it, and one without it is of version 1.
UPDATE_VERSION = 2


@dataclass(frozen=True)
class Update:
    """Coefficients of an iteration's directions, and the optimizer's step size.

    Attributes:
        iteration: Iteration of the update.
        coefficients: Coefficient of each direction, float32 values: the gradient is the sum over directions
            of coefficient times noise.
        alpha: Step size for what the coefficients do not contain: Adam's step, and decay.
        noise_iteration: Iteration whose noise the directions have; None: ``iteration``.
    """

    iteration: int
    coefficients: Sequence[float]
    alpha: float = 0.0
    noise_iteration: int | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Read an update from a journal's record."""
        return cls(
            record["iteration"], record["coefficients"], record["alpha"], record.get("noise_iteration")
        )

    def record(self) -> dict[str, Any]:
        """Return the journal's record of it."""
        kept = {"iteration": self.iteration, "coefficients": list(self.coefficients), "alpha": self.alpha}
        return kept if self.noise_iteration is None else kept | {"noise_iteration": self.noise_iteration}

    @property
    def noise_of(self) -> int:
        """Iteration whose noise the directions have."""
        return self.iteration if self.noise_iteration is None else self.noise_iteration


@dataclass(frozen=True)
class Perturbation:
    """A member's distance from the centre: sigma times a direction's noise.

    Attributes:
        iteration: Iteration whose noise it is.
        direction: Index of the direction within the iteration.
        sigma: Scale of the noise; negative for the second member of an antithetic pair.
    """

    iteration: int
    direction: int
    sigma: float
