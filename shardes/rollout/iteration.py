"""One iteration's problems, and which member answers which of them with which perturbation."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from shardes.es.member import MemberResult
from shardes.es.objective import MEAN, Objective
from shardes.es.strategy import Strategy
from shardes.es.update import Perturbation
from shardes.rollout.aggregate import Evaluation
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.prompts import PromptBatch
from shardes.tasks.base import Row
from shardes.tasks.screening import AskedProblems


@dataclass(frozen=True)
class IterationSpec:
    """What an iteration asks of its members.

    Attributes:
        iteration: Number of updates before it.
        rows: Its problems.
        evaluator: Prepares them.
        strategy: Says which member has which perturbation and problems.
        objective: What a member earns by the answers to a problem.
        asked: The choice of problems that were asked, where some are screened; None: there was none.
    """

    iteration: int
    rows: Sequence[Row]
    evaluator: Evaluator
    strategy: Strategy
    objective: Objective = MEAN
    asked: AskedProblems | None = None

    @functools.cached_property
    def prompts(self) -> PromptBatch:
        """Return all problems of the iteration, prepared."""
        return self.evaluator.prepare(self.rows, iteration=self.iteration)

    @property
    def members(self) -> Sequence[int]:
        """Return the indices of the iteration's members, ascending."""
        return range(self.strategy.num_members(self.iteration))

    def perturbation(self, member: int) -> Perturbation:
        """Return the direction and signed sigma of a member."""
        return self.strategy.perturbation(member, iteration=self.iteration)

    @property
    def weights(self) -> Sequence[float] | None:
        """Return the weight of each problem in members' rewards; None: all weigh the same."""
        return None if self.asked is None else self.asked.weights

    def weights_of(self, member: int) -> Sequence[float] | None:
        """Return the weights of the problems that a member answers; None: all weigh the same."""
        indices, weights = self.indices_of(member), self.weights
        return weights if weights is None or indices is None else [weights[index] for index in indices]

    def indices_of(self, member: int) -> list[int] | None:
        """Return the indices of the problems that a member answers; None: all."""
        return self.strategy.problems_of(member, num_problems=len(self.rows))

    def prompts_of(self, member: int) -> PromptBatch:
        """Return the prepared problems that a member answers."""
        indices = self.indices_of(member)
        if indices is None:
            return self.prompts
        return self.evaluator.prepare([self.rows[index] for index in indices], iteration=self.iteration)

    def result_of(self, member: int, evaluation: Evaluation) -> MemberResult:
        """Return the result of a member whose answers earned this."""
        return evaluation.result_of(
            member,
            problems=self.indices_of(member),
            objective=self.objective,
            weights=self.weights_of(member),
        )
