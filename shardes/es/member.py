"""Results of members, and the rules for failed rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from shardes.errors import UserError

RESULT_VERSION = 1
"""Version of the fields of ``MemberResult``; records without one are of the first."""


@dataclass(frozen=True)
class MemberResult:
    """Rewards and counts of one member of the population.

    Attributes:
        member: Index of the member in the iteration.
        reward: Mean reward over its answers that count, or what the objective makes of them; None if none
            does, or if its logits were not finite.
        num_failures: Number of answers whose reward failed.
        num_tokens: Number of generated tokens.
        num_scored: Number of answers that count.
        least: Smallest reward of an answer; None if none counts.
        components: Mean of each reward component by name, over the answers that it applies to.
        is_finite: Whether its logits were finite; if not, its answers mean nothing.
        by_problem: The same over its answers to each problem; None if none counts, or if none was
            asked, because the member stopped before (``racing.py``).
        problems: Indices of these problems among the iteration's, in order; None: all problems.
        turn_tokens: Tokens generated in each turn of its episodes; empty if problems are answered once.
        by_least: a and b, if its reward with failed answers at a least reward L is ``a + b * L``; empty if
            that follows from the mean and the counts.
        samples: A few answers of the first member for people to read; not journaled.
        part: What the answers of a portion earned one by one, while its member races; not journaled with it.
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
    turn_tokens: Sequence[int] = field(default_factory=list)
    by_least: Sequence[float] = field(default_factory=list)
    samples: Sequence[Mapping[str, Any]] = field(default_factory=list)
    part: Mapping[str, Any] | None = None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Read a result from a journal's record.

        Raises:
            UserError: A later shardes wrote it, in which a result is something else.
        """
        if record.get("version", RESULT_VERSION) > RESULT_VERSION:
            raise UserError(f"run.dir: member results of version {record['version']} are of a later shardes")
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    def record(self) -> dict[str, Any]:
        """Return the journal's record of it."""
        kept = {key: value for key, value in vars(self).items() if key not in ("samples", "part")}
        for key in ("turn_tokens", "by_least"):
            if not kept[key]:
                del kept[key]
        return {"version": RESULT_VERSION} | kept


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
    return [_with_failures_at(least, result) for result in results]


def _with_failures_at(least: float, result: MemberResult) -> float | None:
    """Return a member's reward where failed answers earn the least reward."""
    if result.num_failures == 0 or not result.is_finite:
        return result.reward
    if result.by_least:
        constant, factor = result.by_least
        return constant + factor * least
    total = math.fsum([(result.reward or 0.0) * result.num_scored, least * result.num_failures])
    return total / (result.num_scored + result.num_failures)


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
    try:
        mean = math.fsum(rewards) / len(rewards)
        return mean, math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    except OverflowError:  # in a sum or a square
        scale = 4 * max(map(abs, rewards))
        mean, deviation = mean_and_deviation([reward / scale for reward in rewards])
        return mean * scale, deviation * scale


def check_enough_rewards(
    rewards: Sequence[float | None],
    results: Sequence[MemberResult],
    *,
    iteration: int,
    min_valid_fraction: float,
    first_failure: str | None,
    is_episodic: bool = False,
) -> None:
    """End a run in which too few members could be judged to learn from them.

    Args:
        rewards: Of all members, by the rule for failed rewards.
        results: Of all members.
        iteration: The iteration, for the message.
        min_valid_fraction: ``es.min_valid_fraction``.
        first_failure: The first failed reward that this rank saw, for the message.
        is_episodic: Whether problems are episodes, whose rewards need not be ``task.reward``'s.

    Raises:
        UserError: Too few could be judged; it says why, and what helps.
    """
    num_judged = sum(reward is not None for reward in rewards)
    wanted = max(1, math.ceil(min_valid_fraction * len(rewards)))
    if num_judged >= wanted:
        return
    num_nonfinite = sum(not result.is_finite for result in results)
    causes = []
    if num_failed := len(rewards) - num_judged - num_nonfinite:
        first = first_failure or "None for every answer, or what another rank warns of"
        what = "task: {} had no episode" if is_episodic else "task.reward: {} had no answer"
        causes.append(f"{what.format(num_failed)} that could be scored; the first failure was {first}")
    if num_nonfinite:
        causes.append(
            f"es.sigma: {num_nonfinite} had logits that are not finite, which a smaller one, or a wider "
            "model.dtype, may prevent"
        )
    raise UserError(
        f"{num_judged} of the {len(rewards)} members of iteration {iteration} could be judged; wanted at "
        f"least {wanted} (es.min_valid_fraction). {'; '.join(causes)}. Mend that and start again: "
        "nothing is lost"
    )
