"""Objective: what a member earns by the answers to a problem, and by all of its problems."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shardes.es.member import mean_reward


@dataclass(frozen=True)
class Objective:
    """Rule that makes one reward of those of several answers to a problem.

    Attributes:
        best_of: k: the expected largest reward of k of the answers, drawn without replacement; 1: their mean.
    """

    best_of: int = 1

    @property
    def is_mean(self) -> bool:
        """Return whether it is the mean over answers."""
        return self.best_of == 1

    def of_problem(self, rewards: Sequence[float | None]) -> float | None:
        """Compute what the answers to one problem earn; None if none of them counts.

        Args:
            rewards: Reward of each answer; None: it does not count.
        """
        if self.is_mean:
            return mean_reward(rewards)
        counted = [reward for reward in rewards if reward is not None]
        return expected_maximum(counted, k=self.best_of) if counted else None

    def of_problems(self, rewards: Sequence[float | None], *, samples_per_prompt: int) -> list[float | None]:
        """Compute what the answers to each problem earn.

        Args:
            rewards: Reward of each answer, those to one problem side by side.
            samples_per_prompt: Answers to each problem.
        """
        firsts = range(0, len(rewards), samples_per_prompt)
        return [self.of_problem(rewards[first : first + samples_per_prompt]) for first in firsts]


MEAN = Objective()
"""The mean over answers, the default."""


def make_objective(name: str, *, samples_per_prompt: int) -> Objective:
    """Return the objective that ``task.objective`` names.

    Args:
        name: ``mean``, ``max`` or ``pass@K``.
        samples_per_prompt: Answers to each problem, of which ``max`` takes the best.
    """
    if name == "mean":
        return MEAN
    return Objective(samples_per_prompt if name == "max" else int(name.removeprefix("pass@")))


def expected_maximum(rewards: Sequence[float], *, k: int) -> float:
    """Compute the mean of the largest reward over all choices of k rewards, without replacement.

    If the rewards are independent draws, it is an unbiased estimate of the expected largest of k; for rewards
    of 0 and 1 it is pass@k (Chen et al. 2021, arXiv 2107.03374), in whose bits it agrees.

    Args:
        rewards: One or more, in any order; their order does not change a bit of the result.
        k: Number that is chosen; with fewer rewards, all are.
    """
    in_order, shares = sorted(rewards), _shares_below(len(rewards), k)
    # A step between neighbours is missed if all that are chosen are below it.
    steps = zip(itertools.pairwise(in_order), shares, strict=True)
    return float(in_order[-1] - math.fsum((high - low) * share for (low, high), share in steps))


def expected_maximum_over_least(
    rewards: Sequence[float], num_failures: int, *, k: int
) -> tuple[float, float]:
    """Compute ``expected_maximum`` of rewards and of failed ones, which count as a least reward.

    Args:
        rewards: Those that have not failed; none is below the least.
        num_failures: Number of those that have; one or more if there are no others.
        k: Number that is chosen; with fewer in all, all are.

    Returns:
        a and b: with the least reward L, the value is ``a + b * L``.
    """
    if not rewards:
        return 0.0, 1.0
    size = num_failures + len(rewards)
    chosen = min(k, size)
    only_failed = math.comb(num_failures, chosen) / math.comb(size, chosen)
    in_order, shares = sorted(rewards), _shares_below(size, k)[num_failures:]
    steps = zip(itertools.pairwise(in_order), shares, strict=True)
    missed = [(high - low) * share for (low, high), share in steps]
    return in_order[-1] - math.fsum([*missed, in_order[0] * only_failed]), only_failed


@functools.lru_cache(maxsize=256)
def _shares_below(size: int, k: int) -> tuple[float, ...]:
    """Return, for i from 1 to ``size - 1``, the share of the choices of k that are among the i least."""
    chosen = min(k, size)
    return tuple(math.comb(i, chosen) / math.comb(size, chosen) for i in range(1, size))


@dataclass(frozen=True)
class Judgement:
    """Rewards of a member by its answers.

    Attributes:
        reward: Its reward; None if no answer counts.
        by_problem: What it earns by each problem; None if none of the answers counts.
        by_least: a and b, if the reward with failed answers at a least reward L is ``a + b * L``; empty if
            that follows from the mean and the number of failures, or if nothing has failed.
    """

    reward: float | None
    by_problem: list[float | None] = field(default_factory=list)
    by_least: list[float] = field(default_factory=list)


def judge(
    rewards: Sequence[float | None],
    has_failed: Sequence[bool],
    *,
    samples_per_prompt: int,
    objective: Objective = MEAN,
    weights: Sequence[float] | None = None,
) -> Judgement:
    """Compute a member's reward from those of its answers.

    With the mean, that is the mean over all answers that count; otherwise the mean over problems of what each
    earns. Weights of problems weigh both.

    Args:
        rewards: Reward of each answer, those to one problem side by side; None: it does not count.
        has_failed: For each answer, whether its reward failed.
        samples_per_prompt: Answers to each problem.
        objective: What the answers to a problem earn.
        weights: Weight of each problem, above 0; None: all weigh the same.
    """
    by_problem = objective.of_problems(rewards, samples_per_prompt=samples_per_prompt)
    if objective.is_mean and weights is None:
        return Judgement(mean_reward(rewards), by_problem)
    weights = [1.0] * len(by_problem) if weights is None else weights
    parts: list[tuple[float, float]] = []
    over_least: list[tuple[float, float, float]] = []
    for place, (weight, value) in enumerate(zip(weights, by_problem, strict=True)):
        answers = slice(place * samples_per_prompt, (place + 1) * samples_per_prompt)
        counted = [reward for reward in rewards[answers] if reward is not None]
        failures = zip(rewards[answers], has_failed[answers], strict=True)
        num_failures = sum(failed and reward is None for reward, failed in failures)
        if objective.is_mean:
            parts += [(weight, reward) for reward in counted]
            over_least += [(weight, reward, 0.0) for reward in counted] + [(weight, 0.0, 1.0)] * num_failures
        else:
            parts += [] if value is None else [(weight, value)]
            if counted or num_failures:
                pair = expected_maximum_over_least(counted, num_failures, k=objective.best_of)
                over_least.append((weight, *pair))
    by_least: list[float] = []
    if any(failed and reward is None for reward, failed in zip(rewards, has_failed, strict=True)):
        total = math.fsum(weight for weight, *_ in over_least)
        by_least = [math.fsum(weight * pair[at] for weight, *pair in over_least) / total for at in (0, 1)]
    return Judgement(_weighted_mean(parts), by_problem, by_least)


def _weighted_mean(parts: Sequence[tuple[float, float]]) -> float | None:
    """Compute the mean of weighted values, exact where all are equal; None if there are none."""
    if not parts:
        return None
    values = [value for _, value in parts]
    if min(values) == max(values):
        return values[0]
    return math.fsum(weight * value for weight, value in parts) / math.fsum(weight for weight, _ in parts)
