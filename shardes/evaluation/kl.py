"""An estimate of the divergence of the centre's answers from the base model's.

The base model answers a few prompts once, its answers drawn at temperature 1. How much likelier it finds them
than the centre does is then an estimate of the Kullback-Leibler divergence KL(base || centre): unbiased, from
log-likelihoods of given tokens alone, with no second model in memory.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardes.distributed.group import Group
from shardes.rewards.pool import InProcessRewards
from shardes.rewards.scorer import Scorer
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.scheduler import MemberScheduler
from shardes.tasks.base import Component, Row, Task


class KLEstimator:
    """Estimator of the divergence on a probe batch; every rank has one, and all call it alike.

    Args:
        rollout: The run's evaluator, whose gather mode is used.
        population: The run's scheduler, which evaluates the centre.
        task: The task that makes the prompts.
        rows: The problems that the base model answers.
        world: All ranks.
    """

    def __init__(
        self,
        rollout: Evaluator,
        population: MemberScheduler,
        *,
        task: Task,
        rows: Sequence[Row],
        world: Group,
    ) -> None:
        self._rollout = rollout
        self._population = population
        # Answers are compared by their likelihood, not by a reward.
        alike = Component("alike", _alike)
        probe = Task("probe", rows, (), task.make_prompt, (alike,), metric="log_likelihood")
        self._scorer = Scorer(probe, rewards=InProcessRewards([alike]), on_error="exclude")
        self._world = world
        self._problems: PromptBatch | None = None
        self._base: list[float] = []
        self._num_tokens: list[int] = []

    def draw(self) -> dict[str, Any]:
        """Have the base model, which must be the centre, answer; a collective of all ranks.

        Returns:
            The journal's record: tokens of prompts and answers, and each answer's mean log-likelihood.
        """
        sampler = self._rollout.drawing()
        problems = sampler.prepare(self._scorer.task.train, iteration=0, scorer=self._scorer)
        found = self._population.evaluate_centre(problems, rollout=sampler, keeps_samples=True)
        sampler.release()
        parts = self._world.gather_json({index: sample.token_ids for index, sample in found.samples.items()})
        answers = {int(index): tokens for part in parts for index, tokens in part.items()}
        prompts = self._rollout.tokens_of(self._scorer.task)
        pairs = [[prompts[index], answers[index]] for index in sorted(answers) if answers[index]]
        record: dict[str, Any] = {"type": "probe", "pairs": pairs}
        return record | {"log_likelihoods": self._log_likelihoods(pairs)}

    def use(self, record: Mapping[str, Any]) -> None:
        """Compare with a record that ``draw`` returned, from now on."""
        self._problems = self._rollout.prepare_pairs(record["pairs"], scorer=self._scorer)
        self._base = record["log_likelihoods"]
        self._num_tokens = [len(answer) for _, answer in record["pairs"]]

    def measure(self) -> float | None:
        """Return the divergence in nats per token; a collective of all ranks.

        Returns:
            None if the base model's answers are all empty, or the centre's logits are not finite.
        """
        assert self._problems is not None, "use comes first"
        total = sum(self._num_tokens)
        if not total:
            return None
        now = self._found(self._problems)
        pairs = zip(self._num_tokens, self._base, now, strict=True)
        divergence = sum(number * (base - value) for number, base, value in pairs) / total
        return divergence if math.isfinite(divergence) else None

    def _log_likelihoods(self, pairs: Sequence[Sequence[list[int]]]) -> list[float]:
        return self._found(self._rollout.prepare_pairs(pairs, scorer=self._scorer)) if pairs else []

    def _found(self, problems: PromptBatch) -> list[float]:
        """Return each answer's mean log-likelihood per token under the centre."""
        found = self._population.evaluate_centre(problems)
        return [float("nan") if value is None else value for value in found.components["log_likelihood"]]


def _alike(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]
