"""One iteration's move of the weights: what the journal keeps of it, and all that a replay needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Update:
    """An iteration's coefficients, and what an optimizer makes of them.

    Attributes:
        iteration: Which.
        coefficients: One for each direction, float32 values: the gradient is their sum times the directions'
            noise.
        alpha: The step size, for what is not part of the coefficients: Adam's step, and decay.
        noise_iteration: Whose noise it is; None: the iteration's own.
    """

    iteration: int
    coefficients: Sequence[float]
    alpha: float = 0.0
    noise_iteration: int | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """That of a journal's record."""
        return cls(
            record["iteration"], record["coefficients"], record["alpha"], record.get("noise_iteration")
        )

    def record(self) -> dict[str, Any]:
        """What the journal keeps."""
        kept = {"iteration": self.iteration, "coefficients": list(self.coefficients), "alpha": self.alpha}
        return kept if self.noise_iteration is None else kept | {"noise_iteration": self.noise_iteration}

    @property
    def noise_of(self) -> int:
        """Whose noise it is."""
        return self.iteration if self.noise_iteration is None else self.noise_iteration


@dataclass(frozen=True)
class Perturbation:
    """Where a member looks: the centre plus sigma times a direction's noise.

    Attributes:
        iteration: Whose noise.
        direction: Which.
        sigma: The noise's scale; negative for the second member of an antithetic pair.
    """

    iteration: int
    direction: int
    sigma: float
