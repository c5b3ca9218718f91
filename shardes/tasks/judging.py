"""Reward functions that judge each completion by itself."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from shardes.tasks.base import Prompt, RewardFunction


def per_completion(judge: Callable[..., float]) -> RewardFunction:
    """Make a reward function of a judge of one completion.

    Args:
        judge: Called with the text, and by name with its row's values in the columns that the judge's
            keyword-only parameters name; it sees no prompt.

    Returns:
        The reward function, of the judge's name.
    """
    names = {p.name for p in inspect.signature(judge).parameters.values() if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(judge)
    def reward(
        prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float]:
        taken = {name: values for name, values in columns.items() if name in names}
        return [
            float(judge(text, **dict(zip(taken, values, strict=True))))
            for text, *values in zip(completions, *taken.values(), strict=True)
        ]

    # Arguments of the configuration are then values for each completion, not lists of them.
    reward.is_per_completion = True  # type: ignore[attr-defined]
    return reward
