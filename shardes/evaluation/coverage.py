"""Compute the coverage of answers that were drawn (pass@k), and the problems gained and lost by a change."""

import math
from collections.abc import Sequence

MOST_ANSWERS = 128
"""Largest k for which pass@k is computed."""


def passes_of(
    rewards: Sequence[float | None], has_failed: Sequence[bool], *, pass_reward: float
) -> list[float | None]:
    """Return 1.0 for each answer that passes and 0.0 for each other one, a failed reward being no pass.

    Args:
        rewards: Reward of each answer; None: it does not count.
        has_failed: For each answer, whether its reward failed.
        pass_reward: Least reward of an answer that passes.

    Returns:
        One value per answer; None where no reward applies to it.
    """
    return [
        None
        if reward is None and not failed
        else float(reward is not None and reward >= pass_reward and not failed)
        for reward, failed in zip(rewards, has_failed, strict=True)
    ]


def pass_at_k(num_answers: int, num_passes: int, k: int) -> float:
    """Return the chance that at least one of k answers passes, drawn from given ones without replacement.

    It is the unbiased estimator of Chen et al. (2021, arXiv 2107.03374): 1 - C(n - c, k) / C(n, k).

    Args:
        num_answers: Number n of answers to a problem; at least ``k``.
        num_passes: Number c of those that pass.
        k: Number of answers that are drawn; at least 1.

    Raises:
        ValueError: There are fewer answers than are drawn, or more passes than answers.
    """
    if not 0 < k <= num_answers or not 0 <= num_passes <= num_answers:
        raise ValueError(
            f"got k {k}, {num_passes} passes of {num_answers}; wanted 0 < k <= answers >= passes"
        )
    # Whole numbers, so that nothing is lost where both are large.
    return 1.0 - math.comb(num_answers - num_passes, k) / math.comb(num_answers, k)


def numbers_to_draw(num_answers: int) -> list[int]:
    """Return the powers of two up to a number of answers, and at most ``MOST_ANSWERS``."""
    most = min(num_answers, MOST_ANSWERS)
    return [1 << power for power in range(most.bit_length())] if most > 0 else []


def gained_and_lost(
    before: Sequence[bool | None], after: Sequence[bool | None]
) -> tuple[list[int], list[int]]:
    """Return the indices of problems that are solved only after a change, and only before it.

    Args:
        before: For each problem, whether it was solved; None: it is not known, and counts as neither.
        after: The same after the change.
    """
    pairs = list(enumerate(zip(before, after, strict=True)))
    gained = [index for index, (was, now) in pairs if was is False and now is True]
    lost = [index for index, (was, now) in pairs if was is True and now is False]
    return gained, lost
