"""Members that race: asked in portions, after each of which some stop (``shardes/es/racing.py``).

A portion is made of whole micro-batches (of episodes: cohorts) of the iteration, so what a member computes
for it is what it would have computed without racing, and one that is asked everything earns the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

from shardes.config.es import RacingConfig
from shardes.errors import UserError
from shardes.es.member import MemberResult, member_rewards
from shardes.es.population import PopulationResult
from shardes.es.racing import Round, Standing, advance, begin, relative_error
from shardes.es.shaping import RewardTable
from shardes.es.strategy import reward_table
from shardes.rollout.aggregate import Evaluation, PartialResult, joined
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.scheduler import MemberScheduler

PortionKey = tuple[int, int]
"""Number of a round, and a member."""

OnPortion = Callable[[int, MemberResult], None]
"""Called with the number of a round, and what a member's answers of its portion earned (``part``)."""


@dataclass(frozen=True, kw_only=True)
class PortionSpec(IterationSpec):
    """Work of the members that race on: the micro-batches of one portion.

    Attributes:
        whole: What the iteration asks.
        racing: The members, ascending.
        portion: The micro-batches that they are asked.
    """

    whole: IterationSpec
    racing: Sequence[int]
    portion: PromptBatch

    @cached_property
    def prompts(self) -> PromptBatch:
        """Return all problems of the iteration: memory is needed for the longest of them."""
        return self.whole.prompts

    @property
    def members(self) -> Sequence[int]:
        """Return the members that race on."""
        return self.racing

    def prompts_of(self, member: int) -> PromptBatch:
        """Return the portion, which is the same for all members."""
        return self.portion

    def result_of(self, member: int, evaluation: Evaluation) -> MemberResult:
        """Return the result of a member for the portion, with what each answer earned."""
        return replace(super().result_of(member, evaluation), part=joined(evaluation.parts).to_json())


class Race:
    """A race of the members of one iteration.

    Args:
        spec: What the iteration asks.
        settings: Section ``es.racing``.
        antithetic: Whether members come in pairs.
        on_error: ``task.on_reward_error``.
    """

    def __init__(
        self, spec: IterationSpec, settings: RacingConfig, *, antithetic: bool, on_error: str | float
    ) -> None:
        self._spec, self._settings, self._antithetic = spec, settings, antithetic
        self._on_error = on_error
        self._standing = begin(len(spec.members))
        self._parts: dict[int, list[PartialResult]] = {member: [] for member in spec.members}
        self._results: dict[int, MemberResult] = {}
        self._num_answers, self._asked_of_all = 0, set[int]()

    def run(
        self,
        scheduler: MemberScheduler,
        *,
        known: Mapping[PortionKey, Mapping[str, Any]],
        on_portion: OnPortion,
        on_result: Callable[[MemberResult], None],
    ) -> PopulationResult:
        """Have all members answer as much as the race wants of them; a collective of all ranks.

        Args:
            scheduler: Has members evaluated.
            known: What the answers to portions earned (``MemberResult.part``) that were asked before.
            on_portion: Called on rank 0 when a member has answered a portion, as soon as rank 0 knows of it.
            on_result: Called on every rank with the result of each member that has stopped.

        Returns:
            Results of all members over the answers that each was asked, their rewards as if all had been
            asked everything, and their rewards for the problems that all were asked.

        Raises:
            Stopped: On all ranks, if the job was asked to stop.
        """
        whole, spec = self._spec.prompts, self._spec
        portions = portions_of(whole.num_batches, self._settings.rounds, turn=spec.iteration)
        num_answers, num_asked = len(whole.indices()), 0
        racing: Sequence[int] = spec.members
        for number, places in enumerate(portions):
            asked = whole.portion(places)
            self._answer(number, asked, racing, scheduler=scheduler, known=known, on_portion=on_portion)
            before, num_asked = num_asked, num_asked + len(asked.indices())
            self._standing = self._after(racing, before / num_answers, num_asked / num_answers)
            is_last = number == len(portions) - 1
            for member in racing:
                if is_last or member not in self._standing.racing:
                    on_result(self._results[member])
            racing = self._standing.racing
        results = [self._results[member] for member in spec.members]
        return PopulationResult(results, self._standing.rewards, self._table(results), self._stats())

    def _table(self, results: Sequence[MemberResult]) -> RewardTable:
        """Return the rewards of each member for the problems that all were asked."""
        problems = self._spec.prompts.problems_of(self._asked_of_all)
        return [{n: row[n] for n in problems if n in row} for row in reward_table(results)]

    def _stats(self) -> dict[str, float | None]:
        """Return what racing saved, and what it is expected to have changed, by the names of the metrics."""
        everything = len(self._spec.members) * len(self._spec.prompts.indices())
        return {
            "num_answers": self._num_answers,
            "num_answers_saved": everything - self._num_answers,
            "racing_error": relative_error(self._standing, antithetic=self._antithetic),
        }

    def _answer(
        self,
        number: int,
        asked: PromptBatch,
        racing: Sequence[int],
        *,
        scheduler: MemberScheduler,
        known: Mapping[PortionKey, Mapping[str, Any]],
        on_portion: OnPortion,
    ) -> None:
        """Have members answer a portion, and add what they earned to what they had."""
        spec, indices = self._spec, asked.indices()
        if len(racing) == len(spec.members):
            self._asked_of_all.update(indices)
        kept = {each.name: getattr(spec, each.name) for each in fields(spec)}
        portion = PortionSpec(**kept, whole=spec, racing=racing, portion=asked)
        have = {m: part for m in racing if (part := known.get((number, m))) and _answers(part, asked)}
        missing = [member for member in racing if member not in have]
        found = scheduler.evaluate_members(missing, spec=portion, on_result=partial(on_portion, number))
        accumulator = spec.evaluator.accumulator(spec.prompts)
        for member in racing:
            part = have.get(member) or found[member].part
            assert part is not None, "results of a portion have their parts"
            self._parts[member].append(PartialResult.from_json(part))
            self._results[member] = spec.result_of(member, accumulator.merge(self._parts[member]))
            self._num_answers += len(indices)

    def _after(self, racing: Sequence[int], asked_before: float, asked: float) -> Standing:
        """Return where the race stands after a round in which these members took part."""
        results = self._results
        # Of all members: by the rule `worst`, a failed answer counts as the worst one of anybody.
        values = member_rewards(list(results.values()), on_error=self._on_error)
        rewards = dict(zip(results, values, strict=True))
        found = Round(
            earned={member: rewards[member] for member in racing},
            by_problem=[results[member].by_problem for member in racing if rewards[member] is not None],
            broken=[member for member in racing if not results[member].is_finite],
            asked_before=asked_before,
            asked=asked,
        )
        return advance(self._standing, found, settings=self._settings, antithetic=self._antithetic)


def _answers(part: Mapping[str, Any], asked: PromptBatch) -> bool:
    """Return whether what a journal has of a portion is about the answers that are asked."""
    others = [] if asked.choices is not None else part["indices"]
    is_whole = len(part["has_failed"]) == len(part["lengths"]) == len(others)
    return is_whole and part["indices"] == asked.indices()


def portions_of(num_batches: int, num_rounds: int, *, turn: int) -> list[list[int]]:
    """Deal micro-batches, which are sorted by length, out to rounds, so that each has some of every length.

    Args:
        num_batches: Number of micro-batches.
        num_rounds: Number of rounds; there are no more than micro-batches.
        turn: Which of the portions comes first; the iteration's number, so that all take turns.
    """
    count = max(1, min(num_rounds, num_batches))
    return [list(range((number + turn) % count, num_batches, count)) for number in range(count)]


def check_portions(prompts: PromptBatch, settings: RacingConfig, *, micro_batch_size: int) -> None:
    """Refuse rounds that have no micro-batch of their own.

    Args:
        prompts: Problems of an iteration.
        settings: Section ``es.racing``.
        micro_batch_size: ``rollout.micro_batch_size``, once it is a number.

    Raises:
        UserError: There are fewer micro-batches than rounds.
    """
    num_answers = len(prompts.indices())
    if prompts.num_batches >= settings.rounds:
        return
    largest = num_answers // settings.rounds
    remedy = f"lower rollout.micro_batch_size to at most {largest}, or " if largest else ""
    raise UserError(
        f"es.racing.rounds: got {settings.rounds}, but with rollout.micro_batch_size {micro_batch_size} the "
        f"{num_answers} answers of a member to an iteration's problems are {prompts.num_batches} "
        f"{'cohorts' if prompts.episodes is not None else 'micro-batches'}, and a round takes at least one; "
        f"{remedy}lower es.racing.rounds, or raise task.batch_size"
    )
