"""An example of a reward: is the answer a JSON object with the right total?"""

import json
from typing import Any


def total_reward(
    prompts: list[Any], completions: list[Any], total: list[float], **columns: Any
) -> list[float]:
    """One reward for each completion: 1 for the right total, and 0.1 for a JSON object with any.

    Args:
        prompts: What was asked.
        completions: What was answered; of a chat, a list of one message.
        total: The column of that name.
        columns: The other columns.
    """
    return [_reward(answer, wanted) for answer, wanted in zip(completions, total, strict=True)]


def _reward(answer: Any, wanted: float) -> float:
    text = answer if isinstance(answer, str) else answer[0]["content"]
    try:
        found = json.loads(text)["total"]
    except (ValueError, KeyError, TypeError):
        return 0.0
    is_right = isinstance(found, (int, float)) and abs(found - wanted) < 0.005
    return 1.1 if is_right else 0.1
