"""Where a member looks."""

from dataclasses import dataclass


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
