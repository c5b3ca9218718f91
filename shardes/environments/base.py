"""Protocol of environments, and what a rank knows of an episode.

Nothing here imports torch: environments run in processes of their own, which have to start quickly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Message = dict[str, Any]
"""A chat message, with ``role`` and ``content``, as the tokenizer's chat template takes it."""

Observation = str | list[Message]
"""What an environment says: text, which becomes a message of the user, or messages."""


class Environment(Protocol):
    """One episode: an object is made for each, and used from its ``reset`` to its ``close``.

    Methods may be coroutines. ``close`` may be left out.
    """

    def reset(self, **row: Any) -> Observation:
        """Begin the episode of a row, whose columns are the arguments; return what is asked first."""

    def step(self, completion: str) -> tuple[Observation, float, bool]:
        """Take in what the model has said.

        Returns:
            What it is asked next, the reward of this turn, and whether the episode is over; then the
            observation is not shown to the model.
        """

    def close(self) -> None:
        """Free what the episode holds."""


COHORTS_AT_ONCE = 2
"""Cohorts of episodes that a rank plays at a time: one steps while the answers of the other are generated."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """Choice of what runs the episodes of a task.

    Attributes:
        reference: ``package.module:Class``, ``path/to/file.py:Class``, or ``adapter:name``; empty: the tools
            alone make the environment.
        arguments: Arguments of the class, or of the adapter, by name.
        tools: Functions that the model may call, as ``module:function`` or ``file.py:function``.
    """

    reference: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class HarnessSpec:
    """Choice of a harness: a program that plays an episode by asking the endpoint.

    Attributes:
        reference: ``package.module:function`` or ``path/to/file.py:function``.
        arguments: Arguments of the function besides the row and the client, by name.
    """

    reference: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EpisodeSettings:
    """Episodes that the problems of a task are.

    Attributes:
        program: What plays them.
        max_turns: Answers of an episode at most.
        episode_return: Sum of an episode's rewards, or the last one.
        system: System message of an episode whose first observation is a text, which then is a chat; empty:
            a chat without one; None: the text stays what it is.
    """

    program: EnvironmentSpec | HarnessSpec
    max_turns: int = 10
    episode_return: Literal["sum", "last"] = "sum"
    system: str | None = None


@dataclass(frozen=True)
class StepResult:
    """Outcome of a reset or a step.

    Attributes:
        observation: What the model is asked next; empty if ``is_done``.
        reward: Reward of the step; 0 for a reset.
        is_done: Whether the episode is over.
        numbers: Further numbers of the episode so far by name, such as ``success`` or ``tool_errors``.
        failure: Reason why the episode cannot go on; None if it can.
        seconds: Time that the environment took.
    """

    observation: Observation = ""
    reward: float = 0.0
    is_done: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class HarnessOutcome:
    """Outcome of a harness's episode.

    Attributes:
        reward: The episode's return; 0 if it failed.
        failure: Reason why there is none; None if there is one.
        seconds: Time in which the episode did not wait for answers.
    """

    reward: float
    failure: str | None = None
    seconds: float = 0.0


class Episode(Protocol):
    """A rank's handle of an episode that runs elsewhere. ``wait`` follows every other call but ``close``."""

    def step(self, completion: str, *, message: Message | None = None) -> None:
        """Send on what the model has said, and return at once.

        Args:
            completion: Its text.
            message: The same as a message, with ``tool_calls`` if it has called tools; for environments
                with tools.
        """

    def finish(self) -> None:
        """Say that there will be no more steps, as a limit is reached; ``wait`` has the last reward."""

    def wait(self) -> StepResult:
        """Wait for the outcome of the reset, of the last step, or of ``finish``; failures are outcomes."""

    def close(self) -> None:
        """Give the episode up; may be called at any time, also twice."""


class EpisodeRunner(Protocol):
    """Runner of a task's episodes, in this process or in others."""

    @property
    def tools(self) -> Sequence[dict[str, Any]] | None:
        """Return JSON schemas of the tools that the model may call, for the template; None: no tools."""

    @property
    def required(self) -> Sequence[str]:
        """Return the columns that a row must have."""

    @property
    def num_kills(self) -> int:
        """Return how many processes of environments have ended before their time, so far."""

    def close(self) -> None:
        """End all episodes and all processes."""


class EnvironmentRunner(EpisodeRunner, Protocol):
    """Runner of episodes that are reset and stepped."""

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[Episode]:
        """Reset an environment for each row, and return at once."""
