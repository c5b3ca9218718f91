"""Updates and perturbations of the weights: all that a replay needs, and no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

# Version of docs/updates.md; a journal's header has it, and one without it is of version 1.
# From version 3 on, updates may have terms of the last iteration's noise; no other update is any different.
UPDATE_VERSION = 3


@dataclass(frozen=True)
class Update:
    """Coefficients of an iteration's directions, and the optimizer's step size.

    Attributes:
        iteration: Iteration of the update.
        coefficients: Coefficient of each direction, float32 values: the gradient is the sum over directions
            of coefficient times noise.
        alpha: Step size for what the coefficients do not contain: Adam's step, and decay.
        noise_iteration: Iteration whose noise the directions have; None: ``iteration``.
        reused: Coefficient of each direction of the iteration before, float32 values, whose noise is added as
            well; empty: none is.
    """

    iteration: int
    coefficients: Sequence[float]
    alpha: float = 0.0
    noise_iteration: int | None = None
    reused: Sequence[float] = ()

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Read an update from a journal's record."""
        iteration, coefficients, alpha = (record[key] for key in ("iteration", "coefficients", "alpha"))
        reused = tuple(record.get("reused", ()))
        return cls(iteration, coefficients, alpha, record.get("noise_iteration"), reused)

    def record(self) -> dict[str, Any]:
        """Return the journal's record of it."""
        kept: dict[str, Any] = {"iteration": self.iteration, "coefficients": list(self.coefficients)}
        kept["alpha"] = self.alpha
        if self.noise_iteration is not None:
            kept["noise_iteration"] = self.noise_iteration
        if self.reused:
            kept["reused"] = list(self.reused)
        return kept

    @property
    def noise_of(self) -> int:
        """Iteration whose noise the directions have."""
        return self.iteration if self.noise_iteration is None else self.noise_iteration

    @property
    def terms(self) -> list[tuple[int, Sequence[float]]]:
        """Return the sums of noise that it adds, in order: the iteration of the noise, and coefficients."""
        own = (self.noise_of, self.coefficients)
        return [own, (self.iteration - 1, self.reused)] if self.reused else [own]


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
