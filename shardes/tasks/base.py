"""What a task is: rows of data, a prompt for each row, and a reward for each answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
"""One problem, as read from a line of JSON."""

Prompt = str | list[dict[str, str]]
"""Plain text, or chat messages (``role``, ``content``) for the tokenizer's chat template."""

RewardFunction = Callable[..., Sequence[float | None]]
"""``reward(prompts, completions, **columns) -> one float (or None) per completion``.

``prompts`` and ``completions`` are lists of equal length; ``columns`` holds, for every key of the rows,
the list of that key's values. A reward sees the response only, never prompt and response joined: a format
example in the prompt must not earn the format reward.
"""


@dataclass(frozen=True)
class Task:
    """A task: what is asked, and how an answer is judged.

    Attributes:
        name: The name shown in logs.
        train: Rows that members are evaluated on.
        heldout: Rows that only the centre is evaluated on; may be empty.
        make_prompt: Turns a row into a prompt.
        reward: Judges completions.
    """

    name: str
    train: Sequence[Row]
    heldout: Sequence[Row]
    make_prompt: Callable[[Row], Prompt]
    reward: RewardFunction
