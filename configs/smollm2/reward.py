"""Rewards of the tasks in this directory."""

import json
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from shardes.tasks.expression import ExpressionError, evaluate_expression


def receipt_total(
    prompts: Sequence[Any], completions: Sequence[Any], total: Sequence[float], **columns: Any
) -> list[float]:
    """Return 1 for a JSON object with the right total, else half of the likeness to its text.

    The model knows the total from the start, but not the form: likeness tells bad answers apart.

    Args:
        prompts: The chats that were asked.
        completions: Of each, a list of one message.
        total: The column of that name.
        columns: The other columns.
    """
    texts = [message["content"] for (message,) in completions]
    return [_receipt_reward(text.strip(), wanted) for text, wanted in zip(texts, total, strict=True)]


def _receipt_reward(text: str, wanted: float) -> float:
    try:
        found = json.loads(text)["total"]
    except (ValueError, KeyError, TypeError):
        found = None
    if isinstance(found, (int, float)) and abs(found - wanted) < 0.005:
        return 1.0
    return 0.5 * SequenceMatcher(None, text, f'{{"total": {wanted:.2f}}}', autojunk=False).ratio()


def countdown(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[list[int]],
    target: Sequence[int],
    **columns: Any,
) -> list[float]:
    """Return 1 for an expression of the numbers that equals the target, 0.1 for another of the numbers.

    Args:
        prompts: The texts that were asked.
        completions: The lines that followed.
        numbers: The column of that name.
        target: The column of that name.
        columns: The other columns.
    """
    return [
        _countdown_reward(text.strip(), given, wanted)
        for text, given, wanted in zip(completions, numbers, target, strict=True)
    ]


def _countdown_reward(text: str, given: list[int], wanted: int) -> float:
    try:
        value, used = evaluate_expression(text)
    except ExpressionError:
        return 0.0
    if sorted(used) != sorted(given):
        return 0.0
    return 1.0 if value == wanted else 0.1
