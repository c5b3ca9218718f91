"""The reward of the addition problems: a right sum, and a little for each right digit."""

from typing import Any


def digits(prompts: list[str], completions: list[str], sum: list[str], **columns: Any) -> list[float]:
    """1 for the sum's three digits, and 0.1 times the share of digits that are right."""
    return [
        float(text == wanted) + 0.1 * len([0 for a, b in zip(text, wanted, strict=False) if a == b]) / 3
        for text, wanted in zip(completions, sum, strict=True)
    ]
