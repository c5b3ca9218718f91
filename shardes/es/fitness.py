"""From rewards to the coefficients of the update."""

import math
from collections.abc import Sequence

import numpy as np


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


def z_scores(rewards: Sequence[float | None]) -> list[float]:
    """``(R_n - mean R) / (std R + 1e-8)`` (Qiu et al. 2025, section 3), 0 for members without a reward."""
    counted = [reward for reward in rewards if reward is not None]
    if not counted:
        return [0.0] * len(rewards)
    mean, std = mean_and_deviation(counted)
    return [0.0 if reward is None else (reward - mean) / (std + 1e-8) for reward in rewards]


def update_coefficients(rewards: Sequence[float | None], *, alpha: float) -> list[float]:
    """``alpha / N * Z_n`` as float32 values: what the journal records and the update uses."""
    return [float(np.float32(alpha / len(rewards) * z)) for z in z_scores(rewards)]


def step_size(alpha: float, *, schedule: str, iteration: int, num_iterations: int) -> float:
    """Alpha at an iteration: constant, or falling linearly to 0 after the last."""
    return alpha * (1 - iteration / num_iterations) if schedule == "linear" else alpha
