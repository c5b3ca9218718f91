"""Records of a task: rows of data, a prompt for each row, and the rewards of each answer.

Nothing here, nor in any module of a reward, imports torch: rewards run in processes of their own, which
have to start quickly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from shardes.environments.base import EpisodeSettings

Row = Mapping[str, Any]
"""One problem, as read from a data file: its columns by name."""


class PlacedRow(dict[str, Any]):
    """Row that knows where it was read, for messages.

    Args:
        columns: The row's columns.
        where: Its place, such as ``task.data: file.jsonl line 3``.
    """

    def __init__(self, columns: Mapping[str, Any], where: str) -> None:
        super().__init__(columns)
        self.where = where


Prompt = str | list[dict[str, Any]]
"""Plain text, or chat messages (``role``, ``content``) for the tokenizer's chat template.

A message that calls tools (``tool_calls``) may be without content.
"""

RewardFunction = Callable[..., Any]
"""``reward(prompts, completions, **columns) -> one float (or None) per completion``, or a coroutine of it.

``prompts`` and ``completions`` are lists of equal length; ``columns`` holds, for every key of the rows, the
list of that key's values. A function gets the columns that its signature names, and all of them if it has
``**columns``. A reward sees the response only, never prompt and response joined: a format example in the
prompt must not earn the format reward.
"""

Metric = Literal["accuracy", "cross_entropy", "log_likelihood"]
"""Reward of a likelihood task.

- ``accuracy``: 1 if the right completion is the likeliest one, else 0.
- ``cross_entropy``: minus the cross-entropy between the right completion and the softmax over all
  completions' log-likelihoods.
- ``log_likelihood``: the right completion's mean log-likelihood per token.
"""


@dataclass(frozen=True)
class Component:
    """One of the rewards whose weighted sum is an answer's reward.

    Attributes:
        name: Name in metrics.
        function: A function at the top level of a module; or where to find one, as
            ``package.module:function`` or ``path/to/file.py:function``. It is called in another process.
        weight: Factor of the values in the weighted sum.
        arguments: Passed to the function by name, besides the columns.
        takes_messages: True to pass completions of chat prompts as TRL does, each a list of one message
            ``{"role": "assistant", "content": text}``; False to pass plain text.
    """

    name: str
    function: RewardFunction | str
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    takes_messages: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """Choice of the template that chat messages go through, and what it is given besides them.

    Attributes:
        name: One of the tokenizer's templates, or a template itself, as transformers takes either; None: the
            tokenizer's only one, or the one that it calls ``default``.
        arguments: Further variables, such as ``enable_thinking``.
    """

    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choices:
    """Completions of a prompt that a likelihood task compares.

    Attributes:
        completions: The texts whose likelihoods are compared, leading spaces included; one for a task that
            asks how likely a text is (perplexity), with ``gold`` 0.
        gold: The index of the right one.
    """

    completions: list[str]
    gold: int


class Generator(Protocol):
    """Maker of distinct problems: a pure function of its arguments."""

    def __call__(self, num_problems: int, /, *, seed: int) -> list[dict[str, Any]]:
        """Return ``num_problems`` rows."""


@dataclass(frozen=True)
class TaskDefinition:
    """Kind of task, without data: what a module of ``shardes/tasks/builtin`` declares.

    Attributes:
        name: The name that ``task.name`` selects it by; no other task has it.
        make_prompt: Turns a row into a prompt.
        check_row: Raises ``UserError`` for a row that the task cannot use; its second argument names the
            row's place in messages, such as ``task.data: file.jsonl line 3``.
        rewards: Components of a generation task, with distinct names; empty for a likelihood task.
        choices: Turns a row into the completions to compare, for a likelihood task; None for a generation
            task.
        metric: Reward of a likelihood task, unless ``task.metric`` says otherwise.
        row_key: Names a row's problem: rows with the same key are never parted by ``task.heldout_fraction``.
            None: a problem is all columns of its row but ``id``.
        with_label_words: For a task with classes: returns the definition with one word for each class. None
            as argument means the task's own words, and raises ``ValueError`` where it has none.
        generate: Makes problems for ``shardes make-data``, which tells them apart by ``row_key``.
        convert: Turns the directory ``shardes make-data --source`` into rows.
    """

    name: str
    make_prompt: Callable[[Row], Prompt]
    check_row: Callable[[Row, str], None]
    rewards: tuple[Component, ...] = ()
    choices: Callable[[Row], Choices] | None = None
    metric: Metric = "cross_entropy"
    row_key: Callable[[Row], str] | None = None
    with_label_words: "Callable[[Sequence[str] | None], TaskDefinition] | None" = None
    generate: Generator | None = None
    convert: Callable[[Path], list[dict[str, Any]]] | None = None


def all_rewards(tasks: Sequence["Task"]) -> list[Component]:
    """Return the rewards of several tasks, each once."""
    found: list[Component] = []
    for task in tasks:
        found += [component for component in task.rewards if component not in found]
    return found


@dataclass(frozen=True)
class Task:
    """Task with its data, ready to be evaluated.

    Attributes:
        name: The name shown in logs.
        train: Rows that members are evaluated on.
        heldout: Rows that only the centre is evaluated on; may be empty.
        make_prompt: Turns a row into a prompt; it does not fail for these rows.
        rewards: Judge completions of a generation task; empty for a likelihood task.
        choices: Turns a row into the completions to compare, for a likelihood task; None for a generation
            task.
        metric: Reward of a likelihood task.
        chat: The template of prompts that are chat messages.
        all_train: What ``train`` was read as, with rows that were left out since; None: ``train``.
        episodes: For problems that are episodes of many turns, what these are; ``rewards``, if there are any,
            judge their last answers. None: a prompt is answered once.
    """

    name: str
    train: Sequence[Row]
    heldout: Sequence[Row]
    make_prompt: Callable[[Row], Prompt]
    rewards: tuple[Component, ...] = ()
    choices: Callable[[Row], Choices] | None = None
    metric: Metric = "cross_entropy"
    chat: ChatTemplate = ChatTemplate()
    all_train: Sequence[Row] | None = None
    episodes: EpisodeSettings | None = None


def as_text(prompt: Prompt) -> str:
    """Return a prompt for people to read."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
