"""Results of members, and the rules for failed rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self


@dataclass(frozen=True)
class MemberResult:
    """Rewards and counts of one member of the population.

    Attributes:
        member: Index of the member in the iteration.
        reward: Mean reward over its answers that count; None if none does, or if its logits were not finite.
        num_failures: Number of answers whose reward failed.
        num_tokens: Number of generated tokens.
        num_scored: Number of answers that count in the mean.
        least: Smallest reward of an answer; None if none counts.
        components: Mean of each reward component by name, over the answers that it applies to.
        is_finite: Whether its logits were finite; if not, its answers mean nothing.
        by_problem: Mean reward over its answers to each problem that count; None if none does.
        problems: Indices of these problems among the iteration's, in order; None: all problems.
        samples: A few answers of the first member for people to read; not journaled.
    """

    member: int
    reward: float | None
    num_failures: int
    num_tokens: int
    num_scored: int = 0
    least: float | None = None
    components: Mapping[str, float | None] = field(default_factory=dict)
    is_finite: bool = True
    by_problem: Sequence[float | None] = field(default_factory=list)
    problems: Sequence[int] | None = None
    samples: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Read a result from a journal's record."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    def record(self) -> dict[str, Any]:
        """Return the journal's record of it."""
        return {key: value for key, value in vars(self).items() if key != "samples"}


def member_rewards(results: Sequence[MemberResult], *, on_error: str | float) -> list[float | None]:
    """Compute the reward of each member by the rule for failed rewards.

    With ``worst``, every failed reward counts as the smallest reward of any answer of any member: a
    function of all members' results, whatever the order in which they arrive.

    Args:
        results: Results of all members of an iteration.
        on_error: ``task.on_reward_error``; numbers and ``exclude`` are part of the results already.
    """
    least = min((result.least for result in results if result.least is not None), default=None)
    if on_error != "worst" or least is None:
        return [result.reward for result in results]
    return [
        result.reward
        if result.num_failures == 0 or not result.is_finite
        else math.fsum([(result.reward or 0.0) * result.num_scored, least * result.num_failures])
        / (result.num_scored + result.num_failures)
        for result in results
    ]


def apply_reward_error_policy(
    rewards: Sequence[float | None], has_failed: Sequence[bool], *, on_error: str | float
) -> list[float | None]:
    """Compute the rewards of the answers of one evaluation by the rule for failed rewards."""
    least = min((reward for reward in rewards if reward is not None), default=None)
    if on_error != "worst":
        return list(rewards)
    return [least if failed else reward for reward, failed in zip(rewards, has_failed, strict=True)]


def mean_reward(rewards: Sequence[float | None]) -> float | None:
    """Compute the mean of the rewards that are not None, exact in any order; None if there is none."""
    counted = [reward for reward in rewards if reward is not None]
    return math.fsum(counted) / len(counted) if counted else None


def mean_and_deviation(rewards: Sequence[float]) -> tuple[float, float]:
    """Compute mean and population standard deviation of one or more rewards; 0 exactly if all are equal."""
    if min(rewards) == max(rewards):
        return rewards[0], 0.0  # the mean of equal numbers may differ from them in the last place
    mean = math.fsum(rewards) / len(rewards)
    return mean, math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
