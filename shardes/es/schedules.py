"""Schedules of step size and noise scale: pure functions of the iteration."""

import math
from typing import Literal, assert_never

Schedule = Literal["constant", "linear", "cosine"]


def factor(schedule: Schedule, *, iteration: int, num_iterations: int, warmup_iterations: int = 0) -> float:
    """Return the factor of the initial value at iteration t of T.

    - ``constant``: 1;
    - ``linear``: ``1 - t / T``, which is 0 after the last iteration;
    - ``cosine``: ``(1 + cos(pi t / T)) / 2``, the same with a slow start and end (Loshchilov and Hutter 2016,
      arXiv 1608.03983, one period).

    While t is below the number W of warm-up iterations, this is multiplied by ``(t + 1) / (W + 1)``, so that
    neither the first iteration has a step of 0 nor the first after the warm-up one like the last of it.

    Args:
        schedule: Name of the schedule.
        iteration: Iteration t, from 0.
        num_iterations: Number of iterations T, more than t.
        warmup_iterations: Number of warm-up iterations W.
    """
    match schedule:
        case "constant":
            found = 1.0
        case "linear":
            found = 1 - iteration / num_iterations
        case "cosine":
            found = (1 + math.cos(math.pi * iteration / num_iterations)) / 2
        case _:
            assert_never(schedule)
    if iteration < warmup_iterations:
        found *= (iteration + 1) / (warmup_iterations + 1)
    return found


def between(start: float, final: float, *, schedule: Schedule, iteration: int, num_iterations: int) -> float:
    """Return ``final + (start - final) * factor``: a scheduled value without warm-up.

    ``final`` is reached after the last iteration; under ``constant`` the value stays at ``start``.

    Args:
        start: Value at iteration 0.
        final: Value after the last iteration; may be the larger.
        schedule: Name of the schedule, see ``factor``.
        iteration: Iteration, from 0.
        num_iterations: Number of iterations, more than ``iteration``.
    """
    if iteration == 0 or schedule == "constant":
        return start  # exactly; the sum below may miss it in the last place
    share = factor(schedule, iteration=iteration, num_iterations=num_iterations)
    return final + (start - final) * share
