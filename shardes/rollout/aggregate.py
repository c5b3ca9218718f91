"""What the answers to a batch of problems earn: put together from micro-batches, then from ranks.

Each rank enters what it knows into a vector of zeros, so that the sum over ranks is exact, and every rank
works out the same evaluation from it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shardes.errors import UserError
from shardes.es.member import MemberResult, mean_reward
from shardes.rewards.scorer import PendingVerdicts, Scorer
from shardes.rewards.worker import RewardBatch
from shardes.rollout.batching import tokenize
from shardes.rollout.engines.transformers.decoder import Completions
from shardes.tasks.base import Choices, Metric, Prompt, Row

# Micro-batches of less than this go to the rewards with the next one: waking them takes a while, too.
SEND_SECONDS = 0.05

# Answers of a member that are shown to people.
NUM_SAMPLES = 4

EngineOutput = Completions | list[torch.Tensor]
"""The answers to a micro-batch of prompts; or the log-likelihoods of the completions in one of pairs."""


@dataclass(frozen=True)
class Sample:
    """One answer, for people to read."""

    prompt: str
    completion: str
    token_ids: list[int]
    reward: float | None


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
    """

    rewards: list[float | None]
    has_failed: list[bool]
    components: Mapping[str, list[float | None]]
    num_tokens: int
    samples: dict[int, Sample] = field(default_factory=dict)
    is_finite: bool = True
    samples_per_prompt: int = 1

    @property
    def num_failures(self) -> int:
        """Rewards that failed."""
        return sum(self.has_failed)

    def result_of(self, member: int, *, problems: Sequence[int] | None = None) -> MemberResult:
        """What a member that answered so earned.

        Args:
            member: Which.
            problems: Which of the iteration's problems it answered; None: all.
        """
        counted = [reward for reward in self.rewards if reward is not None and self.is_finite]
        return MemberResult(
            member,
            reward=mean_reward(counted),
            num_failures=self.num_failures,
            num_tokens=self.num_tokens,
            num_scored=len(counted),
            least=min(counted, default=None),
            components=self.component_means(),
            is_finite=self.is_finite,
            by_problem=self._by_problem() if self.is_finite else [],
            problems=problems if self.is_finite else [],
            samples=[vars(sample) for sample in list(self.samples.values())[:NUM_SAMPLES]]
            if member == 0
            else [],
        )

    def _by_problem(self) -> list[float | None]:
        """The mean reward for each problem, over the answers that count."""
        count = self.samples_per_prompt
        return [
            mean_reward(self.rewards[first : first + count]) for first in range(0, len(self.rewards), count)
        ]

    def component_means(self) -> dict[str, float | None]:
        """The mean of each component over the answers that it applies to."""
        return {name: mean_reward(values) for name, values in self.components.items()}


class RewardAccumulator(Protocol):
    """One evaluation in the making."""

    def take(self, indices: Sequence[int], found: EngineOutput, *, is_first: bool) -> None:
        """Takes in what a micro-batch gave.

        Args:
            indices: Its rows.
            found: What the model said about them.
            is_first: Whether it is the first micro-batch of all.
        """

    def send(self, *, is_last: bool) -> None:
        """Comes after each micro-batch and after the last: begins what ``totals`` waits for."""

    def totals(self) -> list[float]:
        """What this rank knows; zeros elsewhere."""

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """What all ranks know, from the sum of their totals."""


class CompletionAccumulator:
    """Answers are judged by rewards while further ones are generated.

    Args:
        rows: The problems.
        prompts: What was asked, one for each row.
        samples_per_prompt: Answers to each; answer i is to prompt ``i // samples_per_prompt``.
        scorer: Has them judged.
        text: Turns the tokens of an answer into text.
        keeps_samples: Whether all answers are kept, and not only those of the first micro-batch.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        scorer: Scorer,
        text: Callable[[list[int]], str],
        keeps_samples: bool,
    ) -> None:
        self._rows = rows
        self._prompts = prompts
        self._samples_per_prompt = samples_per_prompt
        self._scorer = scorer
        self._text = text
        self._keeps_samples = keeps_samples
        self._num_answers = len(rows) * samples_per_prompt
        self._indices: list[Sequence[int]] = []
        self._pending: list[PendingVerdicts] = []
        self._unsent: list[RewardBatch] = []
        self._last_sent = time.monotonic()
        self._num_tokens = 0
        self._samples: dict[int, Sample] = {}

    def take(self, indices: Sequence[int], found: EngineOutput, *, is_first: bool) -> None:
        """Takes in the answers of a micro-batch, and has them judged."""
        assert isinstance(found, Completions), "prompts are answered"
        answers = found.tokens
        asked = [index // self._samples_per_prompt for index in indices]
        prompts = [self._prompts[row] for row in asked]
        completions = [self._text(answer) for answer in answers]
        rows = [self._rows[row] for row in asked]
        self._indices.append(indices)
        self._unsent.append(RewardBatch.of(rows, prompts, completions, answers))
        self._num_tokens += sum(map(len, answers))
        if is_first or self._keeps_samples:
            for index, prompt, completion, ids in zip(indices, prompts, completions, answers, strict=True):
                self._samples[index] = Sample(as_text(prompt), completion, list(ids), None)

    def send(self, *, is_last: bool) -> None:
        """Has answers judged, unless further ones will come soon."""
        if self._unsent and (is_last or time.monotonic() - self._last_sent > SEND_SECONDS):
            self._pending += self._scorer.submit(self._unsent)
            self._unsent = []
            self._last_sent = time.monotonic()

    def totals(self) -> list[float]:
        """Waits for the scores, and enters them by answer."""
        size, names = self._num_answers, self._names
        rewards, excluded, failed = [0.0] * size, [0.0] * size, [0.0] * size
        components = {name: [0.0] * (2 * size) for name in names}
        for indices, pending in zip(self._indices, self._pending, strict=True):
            scores = self._scorer.collect(pending)
            for place, index in enumerate(indices):
                value = scores.values[place]
                rewards[index], excluded[index] = (0.0, 1.0) if value is None else (value, 0.0)
                failed[index] = float(scores.has_failed[place])
                for name in names:
                    part = scores.components[name][place]
                    if part is not None:
                        components[name][index], components[name][size + index] = part, 1.0
        parts = [value for name in names for value in components[name]]
        return [*rewards, *excluded, *failed, *parts, float(self._num_tokens)]

    @property
    def _names(self) -> list[str]:
        return [component.name for component in self._scorer.task.rewards]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """From the sums over ranks."""
        size = self._num_answers

        def column(number: int) -> Sequence[float]:
            return totals[number * size : (number + 1) * size]

        rewards = [
            None if is_excluded else reward for reward, is_excluded in zip(column(0), column(1), strict=True)
        ]
        components = {
            name: [
                value if applies else None
                for value, applies in zip(column(3 + 2 * i), column(4 + 2 * i), strict=True)
            ]
            for i, name in enumerate(self._names)
        }
        samples = {
            index: Sample(sample.prompt, sample.completion, sample.token_ids, rewards[index])
            for index, sample in sorted(self._samples.items())
        }
        return Evaluation(
            rewards,
            [bool(flag) for flag in column(2)],
            components,
            int(totals[-1]),
            samples,
            samples_per_prompt=self._samples_per_prompt,
        )


@dataclass(frozen=True)
class ChoiceSet:
    """The pairs of a prompt and a completion that a batch of likelihood problems consists of.

    Attributes:
        prompts: What is asked, one for each row.
        choices: What may follow, one for each row.
        pairs: Tokens of every prompt and completion; those of one row side by side.
        first_pairs: The index of each row's first pair, and the number of all pairs at the end.
    """

    prompts: Sequence[Prompt]
    choices: Sequence[Choices]
    pairs: Sequence[tuple[list[int], list[int]]]
    first_pairs: Sequence[int]


def choice_set(
    prompts: Sequence[Prompt], choices: Sequence[Choices], tokenizer: Any, *, max_positions: int | None
) -> ChoiceSet:
    """Tokenises what may follow each prompt.

    Prompt and completion are tokenised apart, so that a prompt's tokens are the same whatever follows. A
    prompt without text becomes the tokenizer's first token (``bos``); where there is none, the completion's
    first token takes its place and is not scored itself.

    Raises:
        UserError: A completion has no tokens to score, or more than the model has positions for.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    first_pairs = [0]
    for prompt, choice in zip(prompts, choices, strict=True):
        start = tokenize(prompt, tokenizer) if prompt else []
        if not start and tokenizer.bos_token_id is not None:
            start = [tokenizer.bos_token_id]
        for completion in choice.completions:
            tokens = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
            pair = (start, tokens) if start else (tokens[:1], tokens[1:])
            if not pair[1]:
                raise UserError(
                    f"task: the completion {completion!r} of the prompt {as_text(prompt)[:80]!r} has no "
                    "tokens to score; give every completion some text"
                )
            length = len(pair[0]) + len(pair[1])
            if max_positions is not None and length > max_positions:
                raise UserError(
                    f"task: the prompt {as_text(prompt)[:80]!r} and a completion of it have {length} tokens, "
                    f"but the model has {max_positions} positions (max_position_embeddings); shorten or drop "
                    "them"
                )
            pairs.append(pair)
        first_pairs.append(len(pairs))
    return ChoiceSet(prompts, choices, pairs, first_pairs)


class LogLikelihoodAccumulator:
    """How likely the right completions are, and whether they are the likeliest.

    Args:
        problems: What may follow which prompt.
        metric: Which of the numbers is the reward.
        num_samples: How many rows are kept as samples.
    """

    def __init__(self, problems: ChoiceSet, *, metric: Metric, num_samples: int) -> None:
        self._problems = problems
        self._metric = metric
        self._num_samples = num_samples
        self._sums = [0.0] * len(problems.pairs)
        self._num_tokens = 0

    def take(self, indices: Sequence[int], found: EngineOutput, *, is_first: bool) -> None:
        """Takes in the log-likelihoods of the completions' tokens, for the pairs of a micro-batch."""
        assert not isinstance(found, Completions), "completions are given"
        for index, values in zip(indices, found, strict=True):
            self._sums[index] = float(values.double().sum())
            self._num_tokens += len(values)

    def send(self, *, is_last: bool) -> None:
        """There is nothing to wait for."""

    def totals(self) -> list[float]:
        """The log-likelihood of each pair."""
        return [*self._sums, float(self._num_tokens)]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """From the sums over ranks."""
        problems, first = self._problems, self._problems.first_pairs
        columns: dict[str, list[float | None]] = {}
        for row, choices in enumerate(problems.choices):
            sums = totals[first[row] : first[row + 1]]
            num_gold_tokens = len(problems.pairs[first[row] + choices.gold][1])
            for name, value in _judged(sums, choices.gold, num_gold_tokens).items():
                columns.setdefault(name, []).append(value)
        sign = -1.0 if self._metric == "cross_entropy" else 1.0
        rewards = [None if value is None else sign * value for value in columns.get(self._metric, [])]
        samples: dict[int, Sample] = {}
        for row in range(min(self._num_samples, len(rewards))):
            sums = totals[first[row] : first[row + 1]]
            likeliest = max(range(len(sums)), key=lambda i: sums[i])
            samples[row] = Sample(
                as_text(problems.prompts[row]),
                problems.choices[row].completions[likeliest],
                problems.pairs[first[row] + likeliest][1],
                rewards[row],
            )
        is_finite = all(map(math.isfinite, totals))
        return Evaluation(rewards, [False] * len(rewards), columns, int(totals[-1]), samples, is_finite)


def _judged(sums: Sequence[float], gold: int, num_gold_tokens: int) -> dict[str, float | None]:
    """The three numbers of one row, from the log-likelihoods of its completions."""
    if not all(map(math.isfinite, sums)):
        return {"accuracy": None, "cross_entropy": None, "log_likelihood": None}
    largest = max(sums)
    log_total = largest + math.log(math.fsum(math.exp(value - largest) for value in sums))
    others = [value for i, value in enumerate(sums) if i != gold]
    return {
        # A tie is no answer: a model that finds all completions alike knows nothing.
        "accuracy": float(all(sums[gold] > value for value in others)),
        "cross_entropy": log_total - sums[gold],
        "log_likelihood": sums[gold] / num_gold_tokens,
    }


def as_text(prompt: Prompt) -> str:
    """A prompt for people to read."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
