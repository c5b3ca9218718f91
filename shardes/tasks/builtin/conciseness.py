"""Conciseness: answer a question as briefly as the reference does.

The task of Qiu et al. 2025 (arXiv 2509.24372): reward = -|length of the answer - length of the reference|, in
characters. What the answer says is not judged. A row is ``{"prompt": ..., "answer": ...}``.
"""

from collections.abc import Sequence
from typing import Any

from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.rows import text_column


def length_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return minus the difference of length between each completion and its reference, in characters.

    White space around either does not count.
    """
    return [
        -float(abs(len(completion.strip()) - len(reference.strip())))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def make_prompt(row: Row) -> Prompt:
    """Return the row's question as a chat message."""
    return [{"role": "user", "content": row["prompt"]}]


def check_row(row: Row, where: str) -> None:
    """Refuse a row without a question or without a reference.

    Raises:
        UserError: Naming the place and the column.
    """
    text_column(row, "prompt", where, wanted="a question as text")
    text_column(row, "answer", where, wanted="the shortest right answer as text")


TASK = TaskDefinition("conciseness", make_prompt, check_row, rewards=(Component("length", length_reward),))
TASKS = (TASK,)
REWARDS = {"length": length_reward}
