"""Fitness shaping: from members' rewards to the weights of their directions in the update."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, assert_never

from shardes.es.member import mean_and_deviation

Shaping = Literal["zscore", "centered_rank", "none", "per_prompt"]

# Reward of each member for each of its prompts, by prompt id; None for an answer that does not count.
RewardTable = Sequence[Mapping[Hashable, float | None]]

# Added to standard deviations, so that equal rewards divide by something.
_EPSILON = 1e-8


def shape(
    rewards: Sequence[float | None],
    *,
    how: Shaping,
    clip: float | None = None,
    table: RewardTable | None = None,
    weights: Mapping[Hashable, float] | None = None,
) -> list[float]:
    """Compute the shaped rewards ``Z_n``; a member without a reward gets 0 and does not affect the others.

    With R the rewards of the members that have one, and r the table's, m members having seen prompt q:

    - ``zscore``: ``(R_n - mean R) / (std R + 1e-8)`` (Qiu et al. 2025, arXiv 2509.24372, section 3);
    - ``centered_rank``: ranks, spread evenly from -0.5 to 0.5 (Salimans et al. 2017, arXiv
      1703.03864); members that tie share the mean of their ranks, so that equal rewards give 0;
    - ``none``: ``R_n``;
    - ``per_prompt``: the mean over the member's prompts of ``c_nq / (std c + 1e-8)``, where ``c_nq = r_nq -
      mean_n r_nq`` is centred prompt by prompt, and ``std c`` is one number over all members and prompts
      (EGGROLL, Sarkar et al. 2025, arXiv 2511.16652). The c of a prompt that only one member saw is 0. With
      weights, the mean and ``std c`` are weighted ones.

    Standard deviations are those of the population. Sums are exact: no order of members or prompts matters.

    Args:
        rewards: Mean reward of each member; None if it was excluded.
        how: Name of the shaping.
        clip: Limit of a shaped reward's magnitude; None: no limit.
        table: One row per member, for ``per_prompt``; members may have seen different prompts.
        weights: Weight of each prompt, for ``per_prompt``, above 0; None: all weigh the same.

    Raises:
        ValueError: ``per_prompt`` without a table, or with one of another number of members.
    """
    if how == "per_prompt":
        if table is None or len(table) != len(rewards):
            found = "none" if table is None else f"one of {len(table)} members"
            raise ValueError(f"per_prompt wants a table of {len(rewards)} members; got {found}")
        counted_rows = [{} if r is None else row for r, row in zip(rewards, table, strict=True)]
        shaped = _per_prompt(counted_rows) if weights is None else _weighted(counted_rows, weights)
    else:
        counted = [reward for reward in rewards if reward is not None]
        found_for = iter(_shaped(counted, how=how)) if counted else iter(())
        shaped = [0.0 if reward is None else next(found_for) for reward in rewards]
    return shaped if clip is None else [min(max(value, -clip), clip) for value in shaped]


def _shaped(rewards: Sequence[float], *, how: Literal["zscore", "centered_rank", "none"]) -> list[float]:
    match how:
        case "zscore":
            mean, std = mean_and_deviation(rewards)
            return [(reward - mean) / (std + _EPSILON) for reward in rewards]
        case "centered_rank":
            return _centered_ranks(rewards)
        case "none":
            return list(rewards)
        case _:
            assert_never(how)


def _centered_ranks(rewards: Sequence[float]) -> list[float]:
    in_order = sorted(rewards)
    first = {reward: rank for rank, reward in reversed(list(enumerate(in_order)))}
    last = {reward: rank for rank, reward in enumerate(in_order)}
    span = max(len(rewards) - 1, 1)
    # Whole numbers up to the division, so that opposite ranks are opposite numbers.
    return [(first[reward] + last[reward] - (len(rewards) - 1)) / (2 * span) for reward in rewards]


def rewards_by_prompt(table: RewardTable) -> dict[Hashable, list[float]]:
    """Return the rewards that count of each prompt's answers, in the order of members."""
    by_prompt: dict[Hashable, list[float]] = {}
    for row in table:
        for prompt, reward in row.items():
            if reward is not None:
                by_prompt.setdefault(prompt, []).append(reward)
    return by_prompt


def _centred(table: RewardTable) -> list[dict[Hashable, float]]:
    """Return each member's rewards that count, by prompt, as distances from the mean of the prompt."""
    means = {prompt: mean_and_deviation(rewards)[0] for prompt, rewards in rewards_by_prompt(table).items()}
    return [
        {prompt: reward - means[prompt] for prompt, reward in row.items() if reward is not None}
        for row in table
    ]


def _per_prompt(table: RewardTable) -> list[float]:
    centred = [list(row.values()) for row in _centred(table)]
    values = [value for row in centred for value in row]
    scale = (mean_and_deviation(values)[1] if values else 0.0) + _EPSILON
    return [math.fsum(row) / len(row) / scale if row else 0.0 for row in centred]


def _weighted(table: RewardTable, weights: Mapping[Hashable, float]) -> list[float]:
    centred = _centred(table)
    largest = max((abs(value) for row in centred for value in row.values()), default=0.0)
    if largest == 0.0:
        return [0.0] * len(table)
    of_all = [(weights[prompt], value / largest) for row in centred for prompt, value in row.items()]
    # Means of prompts are taken off, so the mean of all is 0. Divided by the largest, no square overflows.
    variance = math.fsum(w * v * v for w, v in of_all) / math.fsum(w for w, _ in of_all)
    scale = math.sqrt(variance) * largest + _EPSILON
    return [
        math.fsum(weights[prompt] * value for prompt, value in row.items())
        / math.fsum(weights[prompt] for prompt in row)
        / scale
        if row
        else 0.0
        for row in centred
    ]
