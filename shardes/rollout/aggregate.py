"""From scored micro-batches to what a batch of problems earned: collected by rank, then merged.

A ``PartialResult`` is what one rank knows of one member. Ranks exchange their parts as JSON, and every rank
works out the same ``Evaluation`` from all of them.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, Protocol, Self, TypeVar

from shardes.es.member import MemberResult, mean_reward
from shardes.es.objective import MEAN, Judgement, Objective, judge
from shardes.rewards.batch import RewardBatch
from shardes.rewards.scorer import PendingRewards, Scorer
from shardes.rollout.engines.base import Completions, EngineOutput
from shardes.tasks.base import Prompt, Row, as_text

T = TypeVar("T")

# Micro-batches of less than this go to the rewards with the next one: waking them takes a while, too.
SEND_SECONDS = 0.05

# Answers of a member that are shown to people.
NUM_SAMPLES = 4


@dataclass(frozen=True)
class Sample:
    """One answer, for people to read."""

    prompt: str
    completion: str
    token_ids: list[int]
    reward: float | None


@dataclass(frozen=True)
class PartialResult:
    """What one rank knows of the answers of one member, or of the centre.

    Attributes:
        indices: Which answers (for likelihoods: which pairs) of the batch these are.
        values: The reward of each, None where it does not count; or the log-likelihood of each pair.
        has_failed: For each, whether its reward failed.
        components: By name, each component's value for each; None where it does not apply.
        num_tokens: Tokens generated or scored, padding not counted.
        is_finite: Whether all logits were finite.
        is_short: Whether this rank had too little memory to answer.
        turn_tokens: Tokens generated in each turn of the episodes, for problems that are episodes.
        lengths: Tokens generated for each answer; empty for likelihoods.
    """

    indices: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    has_failed: list[bool] = field(default_factory=list)
    components: dict[str, list[float | None]] = field(default_factory=dict)
    num_tokens: int = 0
    is_finite: bool = True
    is_short: bool = False
    turn_tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what other ranks are sent."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Return the part that another rank sent."""
        return cls(**record)


@dataclass(frozen=True)
class Evaluation:
    """What a batch of problems earned; the same on every rank that took part, samples apart.

    Attributes:
        rewards: One per answer, those to one problem side by side; None where the reward does not count.
        has_failed: One per answer: whether its reward failed.
        components: By name, the values of each part of the reward, one per answer.
        num_tokens: Tokens generated, or scored, padding not counted.
        samples: By answer, those of the first micro-batch, or all; only those that this rank has seen itself.
        is_finite: Whether everything that the model computed was.
        samples_per_prompt: Answers to each problem.
        turn_tokens: Tokens generated in each turn of the episodes, for problems that are episodes.
        lengths: One per answer: tokens generated for it, in all turns of an episode; empty for likelihoods.
        parts: What it was merged from.
    """

    rewards: list[float | None]
    has_failed: list[bool]
    components: Mapping[str, list[float | None]]
    num_tokens: int
    samples: dict[int, Sample] = field(default_factory=dict)
    is_finite: bool = True
    samples_per_prompt: int = 1
    turn_tokens: Sequence[int] = ()
    lengths: Sequence[int] = ()
    parts: Sequence[PartialResult] = ()

    @property
    def num_failures(self) -> int:
        """Return how many rewards failed."""
        return sum(self.has_failed)

    def result_of(
        self,
        member: int,
        *,
        problems: Sequence[int] | None = None,
        objective: Objective = MEAN,
        weights: Sequence[float] | None = None,
    ) -> MemberResult:
        """Return the journal's record of a member that answered so.

        Args:
            member: Its index in the population.
            problems: Indices of the iteration's problems that it answered; None: all.
            objective: What the answers to a problem earn together.
            weights: Weight of each problem that it answered; None: all weigh the same.
        """
        counted = [reward for reward in self.rewards if reward is not None and self.is_finite]
        judged = Judgement(None)
        if self.is_finite:
            count = self.samples_per_prompt
            rules: dict[str, Any] = {"objective": objective, "weights": weights}
            judged = judge(self.rewards, self.has_failed, samples_per_prompt=count, **rules)
        return MemberResult(
            member,
            reward=judged.reward,
            num_failures=self.num_failures,
            num_tokens=self.num_tokens,
            num_scored=len(counted),
            least=min(counted, default=None),
            components=self.component_means(),
            is_finite=self.is_finite,
            by_problem=judged.by_problem,
            problems=problems if self.is_finite else [],
            turn_tokens=list(self.turn_tokens),
            by_least=judged.by_least,
            samples=[vars(sample) for sample in list(self.samples.values())[:NUM_SAMPLES]]
            if member == 0
            else [],
        )

    def component_means(self) -> dict[str, float | None]:
        """Return the mean of each component over the answers that it applies to."""
        return {name: mean_reward(values) for name, values in self.components.items()}


class RewardAccumulator(Protocol):
    """Collects what one member's answers, or episodes, earn, on one rank."""

    def send(self, *, is_last: bool) -> None:
        """Begin what ``part`` waits for; comes after each micro-batch and after the last."""

    def part(self) -> PartialResult:
        """Wait for the scores, and return what this rank knows."""

    def merge(self, parts: Sequence[PartialResult]) -> Evaluation:
        """Return what all ranks know."""


class BatchAccumulator(RewardAccumulator, Protocol):
    """Accumulator of what micro-batches earn."""

    def take(self, indices: Sequence[int], output: EngineOutput, *, is_first: bool) -> None:
        """Take in a micro-batch.

        Args:
            indices: Its rows, as indices of answers or pairs.
            output: What the engine returned for them.
            is_first: Whether it is the first micro-batch of all.
        """


class CompletionAccumulator:
    """Has completions scored while further ones are generated.

    Args:
        rows: The problems.
        prompts: What was asked, one for each row.
        samples_per_prompt: Answers to each; answer i is to prompt ``i // samples_per_prompt``.
        scorer: Has completions scored.
        text: Turns the tokens of a completion into text.
        opened: What the text of the answers to each row begins with, before their tokens; empty: nothing.
        keeps_samples: Whether all completions are kept, and not only those of the first micro-batch.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        scorer: Scorer,
        text: Callable[[list[int]], str],
        opened: Sequence[str] = (),
        keeps_samples: bool,
    ) -> None:
        self._opened = opened or [""] * len(rows)
        self._rows = rows
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._scorer = scorer
        self._text = text
        self._keeps_samples = keeps_samples
        self._indices: list[Sequence[int]] = []
        self._pending: list[PendingRewards] = []
        self._unsent: list[RewardBatch] = []
        self._last_sent = time.monotonic()
        self._lengths: list[int] = []
        self._samples: dict[int, Sample] = {}

    def take(self, indices: Sequence[int], output: EngineOutput, *, is_first: bool) -> None:
        """Take in the completions of a micro-batch."""
        assert isinstance(output, Completions), "prompts are answered"
        of_rows = [index // self._samples_per_prompt for index in indices]
        prompts = [self._prompts[row] for row in of_rows]
        texts = [
            self._opened[row] + self._text(tokens) for row, tokens in zip(of_rows, output.tokens, strict=True)
        ]
        self._indices.append(indices)
        self._unsent.append(
            RewardBatch.of([self._rows[row] for row in of_rows], prompts, texts, output.tokens)
        )
        self._lengths.extend(map(len, output.tokens))
        if is_first or self._keeps_samples:
            for index, prompt, text, ids in zip(indices, prompts, texts, output.tokens, strict=True):
                self._samples[index] = Sample(as_text(prompt), text, list(ids), None)

    def send(self, *, is_last: bool) -> None:
        """Have completions scored, unless further ones will come soon."""
        if self._unsent and (is_last or time.monotonic() - self._last_sent > SEND_SECONDS):
            self._pending += self._scorer.submit(self._unsent)
            self._unsent = []
            self._last_sent = time.monotonic()

    def part(self) -> PartialResult:
        """Wait for the scores, and return what this rank knows."""
        part = PartialResult(num_tokens=sum(self._lengths), lengths=list(self._lengths))
        for indices, pending in zip(self._indices, self._pending, strict=True):
            scores = self._scorer.collect(pending)
            part.indices.extend(indices)
            part.values.extend(scores.values)
            part.has_failed.extend(scores.has_failed)
            for name, values in scores.components.items():
                part.components.setdefault(name, []).extend(values)
        return part

    def merge(self, parts: Sequence[PartialResult]) -> Evaluation:
        """Put the answers of all ranks in order."""
        return merged(
            parts,
            size=len(self._rows) * self._samples_per_prompt,
            components=[component.name for component in self._scorer.task.rewards],
            samples=self._samples,
            samples_per_prompt=self._samples_per_prompt,
        )


def merged(
    parts: Sequence[PartialResult],
    *,
    size: int,
    components: Iterable[str],
    samples: Mapping[int, Sample],
    samples_per_prompt: int,
) -> Evaluation:
    """Put the answers, or the episodes, of all ranks in order.

    Args:
        parts: What each rank knows.
        size: Answers in all.
        components: Names of the reward's parts, and of what else is known of an answer.
        samples: Samples that this rank has, without their rewards, by answer.
        samples_per_prompt: Answers to each problem.
    """
    rewards: list[float | None] = [None] * size
    has_failed, lengths = [False] * size, [0] * size
    columns: dict[str, list[float | None]] = {name: [None] * size for name in components}
    turn_tokens = [0] * max((len(part.turn_tokens) for part in parts), default=0)
    for part in parts:
        for place, index in enumerate(part.indices):
            rewards[index], has_failed[index] = part.values[place], part.has_failed[place]
            lengths[index] = part.lengths[place]
            for name, values in part.components.items():
                columns.setdefault(name, [None] * size)[index] = values[place]
        for turn, count in enumerate(part.turn_tokens):
            turn_tokens[turn] += count
    return Evaluation(
        rewards,
        has_failed,
        columns,
        sum(part.num_tokens for part in parts),
        {index: replace(sample, reward=rewards[index]) for index, sample in sorted(samples.items())},
        is_finite=all(part.is_finite for part in parts),
        samples_per_prompt=samples_per_prompt,
        turn_tokens=turn_tokens,
        lengths=lengths,
        parts=parts,
    )


def joined(parts: Sequence[PartialResult]) -> PartialResult:
    """Join what all ranks know of a member, in the order of answers: the same for any number of ranks.

    It goes into the journal, which has only finite numbers: a log-likelihood that is not becomes None.
    """
    places = sorted(
        (index, number, at) for number, part in enumerate(parts) for at, index in enumerate(part.indices)
    )

    def in_order(columns: Sequence[Sequence[T]]) -> list[T]:
        return [columns[number][at] for _, number, at in places if columns[number]]

    names = sorted({name for part in parts for name in part.components})
    values = in_order([part.values for part in parts])
    kept = [value if value is not None and math.isfinite(value) else None for value in values]
    return PartialResult(
        indices=[index for index, *_ in places],
        values=kept,
        has_failed=in_order([part.has_failed for part in parts]),
        components={
            name: in_order([part.components.get(name) or [None] * len(part.indices) for part in parts])
            for name in names
        },
        num_tokens=sum(part.num_tokens for part in parts),
        is_finite=all(part.is_finite for part in parts) and kept == values,
        turn_tokens=[sum(turn) for turn in zip_longest(*(part.turn_tokens for part in parts), fillvalue=0)],
        lengths=in_order([part.lengths for part in parts]),
    )
