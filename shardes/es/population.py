"""Results of an iteration's members, and the update that follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardes.es.member import MemberResult, member_rewards
from shardes.es.reward_stats import reward_stats
from shardes.es.shaping import RewardTable
from shardes.es.strategy import Strategy, reward_table
from shardes.es.update import Update


@dataclass(frozen=True)
class PopulationResult:
    """Results of all members of an iteration, in order.

    Attributes:
        results: What each of them answered and earned.
        rewards: Reward of each by the rule for failed rewards, as it counts in the update; None: it has none.
        table: Rewards of each for the problems that tell members apart.
        stats: Further numbers of the iteration, by the names of the metrics.
    """

    results: Sequence[MemberResult]
    rewards: Sequence[float | None]
    table: RewardTable
    stats: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Sequence[MemberResult], *, on_error: str | float) -> "PopulationResult":
        """Return what members earned that were all asked everything.

        Args:
            results: Results of all members.
            on_error: ``task.on_reward_error``.
        """
        return cls(results, member_rewards(results, on_error=on_error), reward_table(results))


@dataclass(frozen=True)
class Decision:
    """Update that was decided on, and how.

    Attributes:
        update: The update.
        has_signal: Whether any member earned something else than the others.
        record: The journal's record of it, from which later iterations may learn.
    """

    update: Update
    has_signal: bool
    record: Mapping[str, Any]


def decide_update(
    strategy: Strategy,
    population: PopulationResult,
    *,
    iteration: int,
    weights: Sequence[float] | None,
    past: Sequence[Mapping[str, Any]],
) -> Decision:
    """Turn the rewards of an iteration's members into an update: a pure function, the same on every rank.

    Args:
        strategy: The algorithm.
        population: What the members earned.
        iteration: Number of the iteration.
        weights: Weight of each of the iteration's problems; None: all weigh the same.
        past: Records of the last updates, oldest first.
    """
    rewards = population.rewards
    shaped = strategy.shaped(rewards, population.results, weights=weights)
    stats = reward_stats(population.table, rewards=rewards, shaped=shaped)
    alpha_factor, measured = strategy.alpha_factor(stats, past=past)
    reused = strategy.reused(past=past)
    update = strategy.update(shaped, iteration=iteration, alpha_factor=alpha_factor, reused=reused)
    instruments = {**stats, **population.stats, **measured, **({} if reused is None else reused.stats())}
    record = {"type": "update", **update.record(), "sigma": strategy.sigma(iteration)}
    record["instruments"] = instruments
    if strategy.reuses_members:
        judged = zip(rewards, shaped, strict=True)
        record["shaped"] = [None if reward is None else value for reward, value in judged]
    return Decision(update, any(shaped), record)
