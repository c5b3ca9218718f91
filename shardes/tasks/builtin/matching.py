"""Tasks whose answers are judged as text: equal to a reference, or matched by a regular expression.

Both ask the row's ``prompt``, or ``task.template``. A row of ``exact_match`` has an ``answer``, one of
``regex`` a ``pattern``.
"""

import re
from collections.abc import Sequence
from typing import Any

from shardes.tasks.answers import is_think_answer
from shardes.tasks.base import Component, Prompt, RewardFunction, Row, TaskDefinition
from shardes.tasks.rows import text_column, wrong
from shardes.tasks.templates import prompt_column


def exact_match_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for the reference's words, whatever their case and the white space, else 0.0."""
    return [
        float(text.casefold().split() == gold.casefold().split())
        for text, gold in zip(completions, answer, strict=True)
    ]


def regex_reward(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    pattern: str | Sequence[str],
    **columns: Sequence[Any],
) -> list[float]:
    """Return 1.0 for a completion that the pattern matches as a whole, else 0.0.

    Args:
        prompts: Unused.
        completions: The responses.
        pattern: Regular expressions of Python, one per completion, or one for all. The dot matches line
            breaks, too. One that takes for ever is ended with the process of the reward.
        **columns: Unused.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        float(re.fullmatch(one, text, re.DOTALL) is not None)
        for one, text in zip(patterns, completions, strict=True)
    ]


def think_answer_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for a pair of think tags and a pair of answer tags and nothing else, else 0.0."""
    return [float(is_think_answer(text)) for text in completions]


def check_answer(row: Row, where: str) -> None:
    """Refuse a row without a reference.

    Raises:
        UserError: Naming the place and the column.
    """
    text_column(row, "answer", where, wanted="the right answer as text")


def check_pattern(row: Row, where: str) -> None:
    """Refuse a row without a pattern, or with one that is no regular expression.

    Raises:
        UserError: Naming the place and the column.
    """
    pattern = text_column(row, "pattern", where, wanted="a regular expression of Python")
    try:
        re.compile(pattern)
    except re.error as error:
        raise wrong("pattern", pattern, where, wanted=f"a regular expression of Python ({error})") from None


EXACT_MATCH = TaskDefinition(
    "exact_match", prompt_column, check_answer, rewards=(Component("exact_match", exact_match_reward),)
)
REGEX = TaskDefinition("regex", prompt_column, check_pattern, rewards=(Component("regex", regex_reward),))
TASKS = (EXACT_MATCH, REGEX)
REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match_reward,
    "regex": regex_reward,
    "think_answer": think_answer_reward,
}
