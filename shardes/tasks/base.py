"""What a task is: rows of data, a prompt for each row, and how each answer is judged.

Nothing here, nor in any module of a reward, imports torch: rewards run in processes of their own, which
have to start quickly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
"""One problem, as read from a data file: its columns by name."""

Prompt = str | list[dict[str, str]]
"""Plain text, or chat messages (``role``, ``content``) for the tokenizer's chat template."""

RewardFunction = Callable[..., Any]
"""``reward(prompts, completions, **columns) -> one float (or None) per completion``, or a coroutine of it.

``prompts`` and ``completions`` are lists of equal length; ``columns`` holds, for every key of the rows, the
list of that key's values. A function gets the columns that its signature names, and all of them if it has
``**columns``. A reward sees the response only, never prompt and response joined: a format example in the
prompt must not earn the format reward.
"""

Metric = Literal["accuracy", "cross_entropy", "log_likelihood"]
"""What a likelihood task is rewarded with.

- ``accuracy``: 1 if the right completion is the likeliest one, else 0.
- ``cross_entropy``: minus the cross-entropy between the right completion and the softmax over all
  completions' log-likelihoods.
- ``log_likelihood``: the right completion's mean log-likelihood per token.
"""


@dataclass(frozen=True)
class Component:
    """One of the rewards that add up to an answer's.

    Attributes:
        name: What it is called in metrics.
        function: A function at the top level of a module; or where to find one, as
            ``package.module:function`` or ``path/to/file.py:function``. It is called in another process.
        weight: What its values are multiplied by in the sum.
        arguments: Passed to the function by name, besides the columns.
        takes_messages: Whether completions of chat prompts are passed as TRL does it, each a list of one
            message ``{"role": "assistant", "content": text}``. Completions are plain text otherwise.
    """

    name: str
    function: RewardFunction | str
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    takes_messages: bool = False


@dataclass(frozen=True)
class Choices:
    """What may follow a prompt, for a likelihood task.

    Attributes:
        completions: The texts whose likelihoods are compared, leading spaces included; one for a task that
            asks how likely a text is (perplexity), with ``gold`` 0.
        gold: The index of the right one.
    """

    completions: list[str]
    gold: int


@dataclass(frozen=True)
class TaskDefinition:
    """A kind of task, whatever its data: what the registry of built-in tasks holds.

    Attributes:
        make_prompt: Turns a row into a prompt.
        check_row: Raises ``UserError`` for a row that it cannot use; its second argument names the row's
            place in messages, such as ``task.data: file.jsonl line 3``.
        rewards: The components of a generation task; empty for a likelihood task.
        choices: What may follow a row's prompt, for a likelihood task; None for a generation task.
        metric: What a likelihood task is rewarded with, unless ``task.metric`` says otherwise.
        row_key: Names a row's problem: rows with the same key are never parted by ``task.heldout_fraction``.
            None: a problem is all the columns of its row.
    """

    make_prompt: Callable[[Row], Prompt]
    check_row: Callable[[Row, str], None]
    rewards: tuple[Component, ...] = ()
    choices: Callable[[Row], Choices] | None = None
    metric: Metric = "cross_entropy"
    row_key: Callable[[Row], str] | None = None


def all_rewards(tasks: Sequence["Task"]) -> list[Component]:
    """The rewards of several tasks, each once."""
    found: list[Component] = []
    for task in tasks:
        found += [component for component in task.rewards if component not in found]
    return found


@dataclass(frozen=True)
class Task:
    """A task with its data: what is asked, and how an answer is judged.

    Attributes:
        name: The name shown in logs.
        train: Rows that members are evaluated on.
        heldout: Rows that only the centre is evaluated on; may be empty.
        make_prompt: Turns a row into a prompt; it does not fail for these rows.
        rewards: Judge completions of a generation task; empty for a likelihood task.
        choices: What may follow a row's prompt, for a likelihood task; None for a generation task.
        metric: What a likelihood task is rewarded with.
    """

    name: str
    train: Sequence[Row]
    heldout: Sequence[Row]
    make_prompt: Callable[[Row], Prompt]
    rewards: tuple[Component, ...] = ()
    choices: Callable[[Row], Choices] | None = None
    metric: Metric = "cross_entropy"


def as_text(prompt: Prompt) -> str:
    """Return a prompt for people to read."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
