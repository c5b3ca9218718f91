"""Means of rewards."""

import math
from collections.abc import Sequence


def mean_reward(rewards: Sequence[float | None]) -> float | None:
    """The mean over answers that count, exact in any order; None if none does."""
    counted = [reward for reward in rewards if reward is not None]
    return math.fsum(counted) / len(counted) if counted else None


def mean_and_deviation(rewards: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation, exactly 0 for equal rewards; there must be at least one."""
    if min(rewards) == max(rewards):
        return rewards[0], 0.0  # the mean of equal numbers may differ from them in the last place
    mean = math.fsum(rewards) / len(rewards)
    return mean, math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
