"""Collect the log-likelihoods of given completions, and judge rows by them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from shardes.rollout.aggregate import Evaluation, PartialResult, Sample
from shardes.rollout.choices import ChoiceSet
from shardes.rollout.engines.base import Completions, EngineOutput
from shardes.tasks.base import Metric, as_text


class LogLikelihoodAccumulator:
    """Accumulator of the log-likelihoods of given completions, which judges the rows at the end.

    Args:
        choices: Pairs of a prompt and a completion, grouped by row.
        metric: Name of the metric that is the reward.
        num_samples: Number of rows that are kept as samples.
    """

    def __init__(self, choices: ChoiceSet, *, metric: Metric, num_samples: int) -> None:
        self._choices = choices
        self._metric = metric
        self._num_samples = num_samples
        self._part = PartialResult()
        self._num_tokens = 0

    def take(self, indices: Sequence[int], output: EngineOutput, *, is_first: bool) -> None:
        """Add the log-likelihoods of a micro-batch's completions.

        Args:
            indices: Index of each pair among all pairs.
            output: Log-likelihoods of the tokens of each completion, float32 of shape [tokens].
            is_first: Unused: all samples are made by ``merge``.
        """
        assert not isinstance(output, Completions), "completions are given"
        for index, values in zip(indices, output, strict=True):
            self._part.indices.append(index)
            self._part.values.append(float(values.double().sum()))
            self._num_tokens += len(values)

    def send(self, *, is_last: bool) -> None:
        """Do nothing: there is nothing to wait for."""

    def part(self) -> PartialResult:
        """Return the log-likelihoods of this rank's pairs."""
        return replace(self._part, num_tokens=self._num_tokens)

    def merge(self, parts: Sequence[PartialResult]) -> Evaluation:
        """Judge each row by the log-likelihoods of its pairs.

        Args:
            parts: Partial results; a row of which they do not have all pairs gets no reward.

        Returns:
            Rewards, metrics and samples by row.
        """
        choices, first = self._choices, self._choices.first_pairs
        totals: list[float | None] = [None] * len(choices.pairs)
        for part in parts:
            for index, value in zip(part.indices, part.values, strict=True):
                totals[index] = value
        columns: dict[str, list[float | None]] = {}
        for row, row_choices in enumerate(choices.choices):
            sums = _known(totals[first[row] : first[row + 1]])
            num_gold_tokens = len(choices.pairs[first[row] + row_choices.gold][1])
            for name, number in _judge(sums, row_choices.gold, num_gold_tokens).items():
                columns.setdefault(name, []).append(number)
        sign = -1.0 if self._metric == "cross_entropy" else 1.0
        rewards = [None if value is None else sign * value for value in columns.get(self._metric, [])]
        samples: dict[int, Sample] = {}
        for row in range(min(self._num_samples, len(rewards))):
            sums = _known(totals[first[row] : first[row + 1]])
            if not sums:
                continue
            likeliest = max(range(len(sums)), key=lambda i: sums[i])
            samples[row] = Sample(
                as_text(choices.prompts[row]),
                choices.choices[row].completions[likeliest],
                choices.pairs[first[row] + likeliest][1],
                rewards[row],
            )
        num_tokens = sum(part.num_tokens for part in parts)
        is_finite = all(part.is_finite for part in parts) and all(map(math.isfinite, filter(None, totals)))
        return Evaluation(
            rewards, [False] * len(rewards), columns, num_tokens, samples, is_finite, parts=parts
        )


def _known(sums: Sequence[float | None]) -> list[float]:
    """Return the log-likelihoods of a row's completions; [] if one of them is not known."""
    known = [value for value in sums if value is not None]
    return known if len(known) == len(sums) else []


def _judge(sums: Sequence[float], gold: int, num_gold_tokens: int) -> dict[str, float | None]:
    """Compute the three metrics of a row.

    Args:
        sums: Log-likelihood of each completion, in nats; empty if they are not known.
        gold: Index of the right completion.
        num_gold_tokens: Number of tokens of the right completion.

    Returns:
        ``accuracy`` (0 or 1), ``cross_entropy`` (nats) and ``log_likelihood`` (nats per token); all None if
        one of ``sums`` is not finite, or if there are none.
    """
    if not sums or not all(map(math.isfinite, sums)):
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
