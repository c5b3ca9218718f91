"""What episodes earn: outcomes, collected by rank and then merged, as for answers to prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from shardes.environments.base import Message
from shardes.rewards.batch import RewardBatch, RewardOutput
from shardes.rewards.scorer import PendingRewards
from shardes.rollout.aggregate import Evaluation, PartialResult, Sample, merged
from shardes.rollout.prompts import PromptBatch
from shardes.tasks.base import Prompt, as_text

Truncation = Literal["turns", "context"]
"""Limit that an episode has met: ``task.max_turns``, or ``rollout.max_context``."""


@dataclass(frozen=True)
class Transcript(Sample):
    """One episode, for people to read."""

    messages: list[Message]


@dataclass(frozen=True)
class EpisodeOutcome:
    """An episode that is over.

    Attributes:
        prompt: What was asked first.
        messages: All that was said, as chat messages.
        answer: The last answer.
        answer_ids: Its tokens.
        rewards: Reward of each turn.
        num_tokens: Tokens of each answer.
        num_cut: Answers that ended at ``rollout.max_new_tokens``, not by themselves.
        truncation: The limit that it has met; None: it ended by itself.
        failure: Reason why it could not go on; None: it could.
        numbers: What the environment counted, by name.
        num_reencoded: Turns before which the whole context was tokenised again.
        seconds: Time that the environment took.
    """

    prompt: Prompt
    messages: list[Message]
    answer: str = ""
    answer_ids: Sequence[int] = ()
    rewards: Sequence[float] = ()
    num_tokens: Sequence[int] = ()
    num_cut: int = 0
    truncation: Truncation | None = None
    failure: str | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    num_reencoded: int = 0
    seconds: float = 0.0

    def earned(self, rule: Literal["sum", "last"]) -> float:
        """Return what it has earned by its environment."""
        return sum(self.rewards) if rule == "sum" else next(reversed(self.rewards), 0.0)

    def components(self) -> dict[str, float]:
        """Return the numbers that are shown besides the reward, by name."""
        return {
            **self.numbers,
            "turns": float(len(self.num_tokens)),
            "truncated": float(self.truncation is not None),
            "context_full": float(self.truncation == "context"),
            "answers_cut": float(self.num_cut),
        }


class EpisodeAccumulator:
    """Collects what one member's episodes earn, on one rank.

    The last answers of a cohort are judged together, in the order of its episodes, once all of them are over:
    so what a reward is called with follows from the data alone.

    Args:
        prompts: The episodes.
        keeps_samples: Whether all episodes are kept, and not only those of the first cohort.
    """

    def __init__(self, prompts: PromptBatch, *, keeps_samples: bool) -> None:
        assert prompts.episodes is not None, "the problems are episodes"
        self._rows, self._samples_per_prompt = prompts.rows, prompts.samples_per_prompt
        self._cohorts = prompts.episodes.cohorts
        self._scorer = prompts.scorer
        self._keeps_samples = keeps_samples
        self._outcomes: dict[int, EpisodeOutcome] = {}
        # Episodes whose last answers are to be judged, and those whose are.
        self._unsent: list[list[int]] = []
        self._sent: list[list[int]] = []
        self._pending: list[PendingRewards] = []
        self._samples: dict[int, Transcript] = {}

    def take(self, index: int, outcome: EpisodeOutcome) -> None:
        """Take in an episode that is over.

        Args:
            index: Which one it is.
            outcome: Its outcome.
        """
        self._outcomes[index] = outcome
        if outcome.failure is not None:
            self._scorer.note_failure(outcome.failure)
        if self._keeps_samples or index in self._cohorts[0]:
            self._samples[index] = Transcript(
                as_text(outcome.prompt), outcome.answer, list(outcome.answer_ids), None, outcome.messages
            )
        cohort = next(each for each in self._cohorts if index in each)
        if self._scorer.task.rewards and all(each in self._outcomes for each in cohort):
            judged = [each for each in cohort if self._outcomes[each].failure is None]
            self._unsent += [judged] if judged else []

    def send(self, *, is_last: bool) -> None:
        """Have the last answers of cohorts that are over scored."""
        if not self._unsent:
            return
        self._pending += self._scorer.submit([self._batch(indices) for indices in self._unsent])
        self._sent += self._unsent
        self._unsent = []

    def _batch(self, indices: Sequence[int]) -> RewardBatch:
        outcomes = [self._outcomes[index] for index in indices]
        return RewardBatch.of(
            [self._rows[index // self._samples_per_prompt] for index in indices],
            [outcome.prompt for outcome in outcomes],
            [outcome.answer for outcome in outcomes],
            [list(outcome.answer_ids) for outcome in outcomes],
        )

    def part(self) -> PartialResult:
        """Wait for the scores, and return what this rank knows."""
        scores: dict[int, tuple[RewardOutput, int]] = {}
        for indices, pending in zip(self._sent, self._pending, strict=True):
            output = self._scorer.collect(pending)
            scores |= {index: (output, place) for place, index in enumerate(indices)}
        episodes = self._scorer.task.episodes
        assert episodes is not None, "the task has episodes"
        part = PartialResult()
        rows: list[Mapping[str, float | None]] = []
        for index, outcome in self._outcomes.items():
            value: float | None = outcome.earned(episodes.episode_return)
            components: dict[str, float | None] = dict(outcome.components())
            has_failed = outcome.failure is not None
            if has_failed:
                value = self._scorer.substitute
            elif index in scores:
                output, place = scores[index]
                components |= {name: values[place] for name, values in output.components.items()}
                score = output.values[place]
                has_failed = output.has_failed[place]
                value = score if has_failed or score is None else (value or 0.0) + score
            part.indices.append(index)
            part.values.append(value)
            part.has_failed.append(has_failed)
            rows.append(components)
            part.lengths.append(sum(outcome.num_tokens))
            for turn, count in enumerate(outcome.num_tokens):
                if turn == len(part.turn_tokens):
                    part.turn_tokens.append(0)
                part.turn_tokens[turn] += count
        for name in sorted({name for row in rows for name in row}):
            part.components[name] = [row.get(name) for row in rows]
        return replace(part, num_tokens=sum(part.lengths))

    def merge(self, parts: Sequence[PartialResult]) -> Evaluation:
        """Put the episodes of all ranks in order."""
        return merged(
            parts,
            size=len(self._rows) * self._samples_per_prompt,
            components=sorted({name for part in parts for name in part.components}),
            samples=self._samples,
            samples_per_prompt=self._samples_per_prompt,
        )
