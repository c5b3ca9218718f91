"""Step size from the measured signal: how much of members' differences other problems would confirm.

A pure function of the journal: of the ratios that past updates' records have, and of this iteration's.
"""

import math
from collections.abc import Iterable
from typing import Literal

StepRule = Literal["none", "reliability"]

WINDOW = 8
"""Number of iterations, this one included, that the signal is measured over."""

# The rule never takes a step that is shorter than this part of alpha: an estimate of 0 is not a signal of 0.
_LEAST_FACTOR = 0.1
# Ratios are sums of many rewards; their last bits may be another library's.
_DIGITS = 6


def reliability(ratios: Iterable[float | None]) -> float | None:
    """Estimate the reliability of members' rewards; None if no iteration measured it.

    It is the share of the variance of members' mean rewards that is the members' own and not that of the
    problems they answered: the squared correlation of their rewards with those on all problems there are.
    Of one iteration the estimate is ``1 - 1 / F`` with ``F = reward_snr**2``, which is Cronbach's alpha
    (1951), the mean of the split-half reliabilities over all ways to split the problems into halves. Over
    iterations, the members' share of both mean squares ``F / (1 + F)`` is averaged, because it is bounded.

    Args:
        ratios: ``reward_snr`` of each iteration; None where it was not defined.

    Returns:
        The estimate, from 0, where members differed by no more than chance, to 1.
    """
    squares = [float(f"{ratio:.{_DIGITS}g}") ** 2 for ratio in ratios if ratio is not None]
    shares = [square / (1 + square) for square in squares]
    if not shares:
        return None
    mean = math.fsum(shares) / len(shares)
    return max(2 - 1 / mean, 0.0) if mean else 0.0


def step_factor(reliable: float | None) -> float:
    """Return what alpha is multiplied by: the root of the reliability, from 0.1 to 1; 1 if it is not known.

    The root is the correlation of the shaped rewards Z with those that the same members would have on all
    problems. Of all multiples of Z, it makes the one that is nearest to these in the mean square.
    """
    return 1.0 if reliable is None else max(_LEAST_FACTOR, math.sqrt(reliable))
