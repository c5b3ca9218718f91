"""Reuse of the last iteration's members, weighted by importance: pure functions of the journal.

A member of the last iteration is ``old centre + sigma eps_m``. From the centre of now, ``Delta`` away, it is
``centre + sigma (eps_m - Delta / sigma)``. The density of members there, over that which it was drawn from:

    w_m = exp(eps_m . Delta / sigma - |Delta|^2 / (2 sigma^2)).

``Delta`` is a sum of the same noise (and of decay, whose product with it is 0 in the mean), so ``eps_m .
Delta`` is a sum of products of directions: of a direction with itself about d, the number of weights, and of
two directions 0 in the mean. With these means in their place (as for the length of an update), ``log w_m`` is
``d c_m / sigma`` and a constant, c_m being the coefficient of the member's direction in the last update:
nothing is computed on the shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Halvings of an interval of length 1 that leave nothing to halve in float64.
_HALVINGS = 60


@dataclass(frozen=True)
class Reused:
    """Weighted rewards of the last iteration's members, and how many members they are worth.

    Attributes:
        values: Shaped reward of each member less the weighted mean, times its normalised weight; 0 for a
            member without a reward.
        effective_members: Effective number of members, ``(sum w)^2 / sum w^2`` (Kish 1965), of the weights.
        exact_effective_members: The same of the weights before they were flattened.
        exponent: Power of the weights that is used: 1 for the density ratio itself, 0 for equal weights.
    """

    values: Sequence[float]
    effective_members: float
    exact_effective_members: float
    exponent: float

    def stats(self) -> dict[str, float]:
        """Return the instruments of the iteration that they are used in."""
        return {
            "reuse_effective_members": self.effective_members,
            "reuse_exact_effective_members": self.exact_effective_members,
            "reuse_exponent": self.exponent,
        }


def reuse(shaped: Sequence[float | None], log_weights: Sequence[float], *, least_share: float) -> Reused:
    """Weigh the members of the last iteration for the estimate around the centre of now.

    The weights are normalised by their sum. Where they leave fewer effective members than ``least_share`` of
    all, they are flattened: raised to the largest power below 1 that leaves as many (Sugiyama et al. 2007,
    JMLR 8). Rewards are centred by their weighted mean, so that the part ``-Delta / sigma`` of the members'
    noise, which is the same for all, drops out of the estimate.

    Args:
        shaped: Shaped rewards that the members had in their own iteration; None for one without a reward.
        log_weights: Logarithm of each member's density ratio, but for a constant that all share.
        least_share: Least effective number of members as a share of those with a reward; 0: never flattened,
            1: all weigh the same.
    """
    counted = [index for index, value in enumerate(shaped) if value is not None]
    if not counted:
        return Reused([0.0] * len(shaped), 0.0, 0.0, 1.0)
    logs = [log_weights[index] for index in counted]
    exponent = _largest_exponent(logs, least_share * len(counted))
    weights = _weights(logs, exponent)
    total = math.fsum(weights)
    rewards = [value for value in shaped if value is not None]
    mean = math.fsum(weight * reward for weight, reward in zip(weights, rewards, strict=True)) / total
    values = [0.0] * len(shaped)
    for index, weight, reward in zip(counted, weights, rewards, strict=True):
        values[index] = weight / total * (reward - mean)
    return Reused(values, _effective(weights), _effective(_weights(logs, 1.0)), exponent)


def _largest_exponent(logs: Sequence[float], least: float) -> float:
    """Return the largest power of the weights, up to 1, that leaves at least so many effective members."""
    if _effective(_weights(logs, 1.0)) >= least:
        return 1.0
    if least >= len(logs):
        return 0.0
    # The effective number falls as the power grows: it is exp(2 K(b) - K(2 b)) with K convex.
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _effective(_weights(logs, middle)) >= least:
            low = middle
        else:
            high = middle
    return low


def _weights(logs: Sequence[float], exponent: float) -> list[float]:
    """Return weights of which the largest is 1."""
    largest = max(logs)
    return [math.exp(exponent * (each - largest)) for each in logs]


def _effective(weights: Sequence[float]) -> float:
    return math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
