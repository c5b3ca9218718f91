"""Weighted rewards of answers, and the rule for answers whose reward fails."""

import logging
from collections.abc import Sequence

from shardes.environments.base import EpisodeRunner
from shardes.rewards.batch import RewardBatch, RewardOutput
from shardes.rewards.pool import PendingRewards, RewardRunner
from shardes.tasks.base import Task

logger = logging.getLogger(__name__)


class Scorer:
    """Judge of the answers to a task's problems.

    Args:
        task: The task whose rewards are used.
        rewards: Runner of the reward functions.
        on_error: Value of an answer whose reward failed: a number; or nothing at all for now, with
            ``exclude`` for good, and with ``worst`` until all answers of the iteration are known.
        environments: Runner of the episodes, for a task whose problems are episodes; else None.

    Attributes:
        task: The task whose rewards are used.
        environments: Argument ``environments``.
        substitute: Value of an answer whose reward failed; None if it has none for now.
        first_failure: Message of the first reward that failed; None if none has.
    """

    def __init__(
        self,
        task: Task,
        *,
        rewards: RewardRunner,
        on_error: str | float,
        environments: EpisodeRunner | None = None,
    ) -> None:
        self.task = task
        self.environments = environments
        self._rewards = rewards
        self._weights = {component.name: component.weight for component in task.rewards}
        self.substitute = None if isinstance(on_error, str) else float(on_error)
        self.first_failure: str | None = None

    def submit(self, batches: Sequence[RewardBatch]) -> list[PendingRewards]:
        """Have batches of answers judged, and return at once; ``collect`` waits for a batch."""
        return self._rewards.submit(self.task.rewards, batches)

    def collect(self, pending: PendingRewards) -> RewardOutput:
        """Wait for a batch's rewards, and add them up with the components' weights."""
        output = pending.result()
        if output.first_failure is not None:
            self.note_failure(output.first_failure)
        return output.weighted(self._weights, substitute=self.substitute)

    def note_failure(self, message: str) -> None:
        """Log that a reward, or an episode, has failed, the first time."""
        if self.first_failure is None:
            self.first_failure = message
            what = "a reward" if self.environments is None else "an episode"
            logger.warning("%s failed, and further ones are only counted: %s", what, message)
