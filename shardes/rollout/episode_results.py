"""What episodes earn: outcomes, collected by rank and then merged, as for answers to prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from shardes.environments.base import Message
from shardes.rewards.batch import RewardBatch
from shardes.rewards.scorer import PendingRewards, Scorer
from shardes.rollout.aggregate import Evaluation, PartialResult, Sample
from shardes.rollout.engines.base import EngineOutput
from shardes.tasks.base import Prompt, Row, as_text

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

    Args:
        rows: The problems.
        samples_per_prompt: Episodes of each; episode i is of row ``i // samples_per_prompt``.
        scorer: Has last answers scored, and knows the rule for episodes that fail.
        keeps_samples: Whether all episodes are kept, and not only those of the first cohort.
    """

    def __init__(
        self, rows: Sequence[Row], *, samples_per_prompt: int, scorer: Scorer, keeps_samples: bool
    ) -> None:
        self._rows = rows
        self._samples_per_prompt = samples_per_prompt
        self._scorer = scorer
        self._keeps_samples = keeps_samples
        self._outcomes: dict[int, EpisodeOutcome] = {}
        self._scored: list[int] = []
        self._pending: PendingRewards | None = None
        self._samples: dict[int, Transcript] = {}

    def take(self, indices: Sequence[int], output: EngineOutput, *, is_first: bool) -> None:
        """Refuse micro-batches: episodes are taken one by one."""
        raise NotImplementedError("episodes are taken by take_episode")

    def take_episode(self, index: int, outcome: EpisodeOutcome, is_first: bool) -> None:
        """Take in an episode that is over.

        Args:
            index: Which one it is.
            outcome: Its outcome.
            is_first: Whether it is of the first cohort of all.
        """
        self._outcomes[index] = outcome
        if outcome.failure is not None:
            self._scorer.note_failure(outcome.failure)
        if is_first or self._keeps_samples:
            self._samples[index] = Transcript(
                as_text(outcome.prompt), outcome.answer, list(outcome.answer_ids), None, outcome.messages
            )

    def send(self, *, is_last: bool) -> None:
        """Have the last answers scored, once all episodes are over."""
        if not is_last or not self._scorer.task.rewards:
            return
        self._scored = [index for index, outcome in self._outcomes.items() if outcome.failure is None]
        outcomes = [self._outcomes[index] for index in self._scored]
        if outcomes:
            batch = RewardBatch.of(
                [self._rows[index // self._samples_per_prompt] for index in self._scored],
                [outcome.prompt for outcome in outcomes],
                [outcome.answer for outcome in outcomes],
                [list(outcome.answer_ids) for outcome in outcomes],
            )
            (self._pending,) = self._scorer.submit([batch])

    def part(self) -> PartialResult:
        """Wait for the scores, and return what this rank knows."""
        scores = None if self._pending is None else self._scorer.collect(self._pending)
        place = {index: at for at, index in enumerate(self._scored)}
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
            elif scores is not None:
                at = place[index]
                components |= {name: values[at] for name, values in scores.components.items()}
                score = scores.values[at]
                has_failed = scores.has_failed[at]
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
        size = len(self._rows) * self._samples_per_prompt
        rewards: list[float | None] = [None] * size
        has_failed = [False] * size
        names = sorted({name for part in parts for name in part.components})
        components: dict[str, list[float | None]] = {name: [None] * size for name in names}
        lengths = [0] * size
        turn_tokens: list[int] = [0] * max((len(part.turn_tokens) for part in parts), default=0)
        for part in parts:
            for place, index in enumerate(part.indices):
                rewards[index], has_failed[index] = part.values[place], part.has_failed[place]
                lengths[index] = part.lengths[place]
                for name, values in part.components.items():
                    components[name][index] = values[place]
            for turn, count in enumerate(part.turn_tokens):
                turn_tokens[turn] += count
        samples: dict[int, Sample] = {
            index: Transcript(**{**vars(sample), "reward": rewards[index]})
            for index, sample in sorted(self._samples.items())
        }
        return Evaluation(
            rewards,
            has_failed,
            components,
            sum(part.num_tokens for part in parts),
            samples,
            is_finite=all(part.is_finite for part in parts),
            samples_per_prompt=self._samples_per_prompt,
            turn_tokens=turn_tokens,
            lengths=lengths,
        )
