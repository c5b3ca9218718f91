"""From answers to rewards: weighted components, and rules for those that fail."""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from shardes.rewards.pool import RewardRunner
from shardes.rewards.worker import RewardBatch, Verdicts
from shardes.tasks.base import Task

logger = logging.getLogger(__name__)

PendingVerdicts = Future[list[Verdicts]]


@dataclass
class Scores:
    """Rewards of some answers.

    Attributes:
        values: One per answer: the weighted sum of its components; None where the reward failed or no
            component applies.
        has_failed: One per answer: whether a component raised, hung, or returned no usable number.
        components: By name, each component's values before weights.
    """

    values: list[float | None]
    has_failed: list[bool]
    components: dict[str, list[float | None]]

    @property
    def num_failures(self) -> int:
        """Answers whose reward failed."""
        return sum(self.has_failed)


class Scorer:
    """Has answers to a task's problems judged.

    Args:
        task: Whose rewards.
        rewards: Where they run.
        on_error: What an answer counts whose reward failed: a number; or nothing at all for now, with
            ``exclude`` for good, and with ``worst`` until all answers of the iteration are known.

    Attributes:
        task: The same.
        first_failure: What went wrong the first time, for messages.
    """

    def __init__(self, task: Task, *, rewards: RewardRunner, on_error: str | float) -> None:
        self.task = task
        self._rewards = rewards
        self._substitute = None if isinstance(on_error, str) else float(on_error)
        self.first_failure: str | None = None

    def submit(self, batches: Sequence[RewardBatch]) -> list[PendingVerdicts]:
        """Has batches of answers judged; ``collect`` turns what comes back into scores."""
        return self._rewards.submit(self.task.rewards, batches)

    def collect(self, pending: PendingVerdicts) -> Scores:
        """Waits for the verdicts, and adds them up."""
        verdicts = pending.result()
        for part in verdicts:
            if part.first_failure is not None and self.first_failure is None:
                self.first_failure = part.first_failure
                logger.warning("a reward failed, and further ones are only counted: %s", self.first_failure)
        has_failed = [any(flags) for flags in zip(*(part.has_failed for part in verdicts), strict=True)]
        by_answer = zip(*(part.values for part in verdicts), strict=True)
        values = [
            self._substitute if failed else self._sum(parts)
            for parts, failed in zip(by_answer, has_failed, strict=True)
        ]
        names = [component.name for component in self.task.rewards]
        return Scores(values, has_failed, dict(zip(names, (part.values for part in verdicts), strict=True)))

    def _sum(self, parts: Sequence[float | None]) -> float | None:
        """The weighted sum of the components that apply; None if none does."""
        weighted = [
            component.weight * value
            for component, value in zip(self.task.rewards, parts, strict=True)
            if value is not None
        ]
        return math.fsum(weighted) if weighted else None
