"""One iteration's problems, and who of its members answers which, looking where."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from shardes.es.strategy import Strategy
from shardes.es.update import Perturbation
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.prompts import PromptBatch
from shardes.tasks.base import Row


@dataclass(frozen=True)
class IterationSpec:
    """What an iteration asks of its members.

    Attributes:
        iteration: Which.
        rows: Its problems.
        rollout: Prepares them.
        strategy: Says who does what.
    """

    iteration: int
    rows: Sequence[Row]
    rollout: Evaluator
    strategy: Strategy

    @functools.cached_property
    def problems(self) -> PromptBatch:
        """All of its problems."""
        return self.rollout.prepare(self.rows, iteration=self.iteration)

    @property
    def members(self) -> range:
        """Its members."""
        return range(self.strategy.num_members(self.iteration))

    def perturbation(self, member: int) -> Perturbation:
        """Where a member looks."""
        return self.strategy.perturbation(member, iteration=self.iteration)

    def indices_of(self, member: int) -> list[int] | None:
        """Which of the problems a member answers; None: all."""
        return self.strategy.problems_of(member, num_problems=len(self.rows))

    def problems_of(self, member: int) -> PromptBatch:
        """The problems that a member answers."""
        indices = self.indices_of(member)
        if indices is None:
            return self.problems
        return self.rollout.prepare([self.rows[index] for index in indices], iteration=self.iteration)
