"""Statistics of an iteration's rewards that measure the signal it learns from."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from shardes.es.shaping import RewardTable, rewards_by_prompt

# Below this share of the largest reward, a difference is what float64 leaves of none.
_ROUNDING = 1e-12


def reward_stats(
    table: RewardTable, *, rewards: Sequence[float | None], shaped: Sequence[float]
) -> dict[str, float | None]:
    """Compute statistics that tell a signal from noise; None where one is not defined.

    Members without a reward count in none of them.

    - ``reward_snr``: with the rewards laid out as n members x m prompts, ``sqrt(MS_members / MS_residual)``
      of the two-way analysis of variance without replication (Scheffé 1959, The Analysis of Variance, chapter
      4): how many times the standard deviation between members' mean rewards is that which would remain if
      members were alike, and only prompts and luck differed. About 1: noise. None with fewer than two members
      or prompts, if an answer is missing, or if members differ alike on every prompt.
    - ``tied_members``: the share of members whose reward is also another's.
    - ``agreed_prompts``: the share, of the prompts that at least two members answered, on which all of these
      earned the same: they cost time and teach nothing.
    - ``informative_prompts``: the share, of all prompts that were asked, on which at least two members earned
      different rewards.
    - ``effective_population``: ``(sum |Z|)**2 / sum Z**2`` (the effective sample size of Kish 1965, Survey
      Sampling, of the weights |Z|): the population if all weigh alike, 1 if one member decides the update.
      None if all Z are 0.

    Args:
        table: Rewards of each member by prompt id; None for an answer that does not count.
        rewards: Reward of each member, from which Z was computed; None for an excluded member.
        shaped: Shaped reward Z of each member.
    """
    counted = [row for row, reward in zip(table, rewards, strict=True) if reward is not None]
    square = math.fsum(value * value for value in shaped)
    return {
        "reward_snr": _signal_to_noise(counted),
        "tied_members": _share_tied([reward for reward in rewards if reward is not None]),
        "agreed_prompts": _share_agreed(counted),
        "informative_prompts": _share_informative(counted, asked={prompt for row in table for prompt in row}),
        "effective_population": math.fsum(map(abs, shaped)) ** 2 / square if square else None,
    }


def _signal_to_noise(table: RewardTable) -> float | None:
    prompts = list(table[0]) if table else []
    num_members, num_prompts = len(table), len(prompts)
    if num_members < 2 or num_prompts < 2:
        return None
    if any(row.keys() != table[0].keys() or None in row.values() for row in table):
        return None
    layout = np.array([[row[prompt] for prompt in prompts] for row in table], np.float64)
    of_members = layout.mean(axis=1, keepdims=True) - layout.mean()
    of_prompts = layout.mean(axis=0, keepdims=True)
    residual = layout - of_members - of_prompts
    between_members = num_prompts * float((of_members**2).sum()) / (num_members - 1)
    within = float((residual**2).sum()) / ((num_members - 1) * (num_prompts - 1))
    if math.sqrt(within) <= _ROUNDING * float(np.abs(layout).max()):
        return None
    return math.sqrt(between_members / within)


def _share_tied(rewards: Sequence[float]) -> float | None:
    sizes = Counter(rewards).values()
    return sum(size for size in sizes if size > 1) / len(rewards) if rewards else None


def _share_agreed(table: RewardTable) -> float | None:
    compared = [rewards for rewards in rewards_by_prompt(table).values() if len(rewards) > 1]
    return sum(len(set(rewards)) == 1 for rewards in compared) / len(compared) if compared else None


def _share_informative(table: RewardTable, *, asked: Collection[Hashable]) -> float | None:
    num_informative = sum(len(set(rewards)) > 1 for rewards in rewards_by_prompt(table).values())
    return num_informative / len(asked) if asked else None
