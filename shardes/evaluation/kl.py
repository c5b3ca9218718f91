"""Estimate the divergence of the centre from the base model, on the base model's own answers.

The base model answers a few prompts once, its answers drawn at temperature 1. How much likelier it finds them
than the centre does is then an estimate of the Kullback-Leibler divergence KL(base || centre): unbiased, from
log-likelihoods of given tokens alone, with no second model in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

from shardes.distributed.group import Group
from shardes.rewards.pool import InProcessRewards
from shardes.rewards.scorer import Scorer
from shardes.rollout.build import Rollout
from shardes.rollout.prompts import PromptBatch
from shardes.runs.recorder import RunRecorder
from shardes.runs.resume import ResumeState
from shardes.tasks.base import Component, Task


class KLEstimator:
    """Estimator of the divergence on a few prompts, every ``log.kl_every`` iterations and at the end.

    Args:
        rollout: Parts that evaluate members and the centre.
        recorder: Recorder of the base model's answers and of the estimates.
        world: All ranks of the job.
    """

    def __init__(self, rollout: Rollout, *, recorder: RunRecorder, world: Group) -> None:
        self._rollout = rollout
        self._evaluator = rollout.evaluator
        self._recorder = recorder
        self._world = world
        config, task = rollout.config, rollout.task
        self._every, self._num_iterations = config.log.kl_every, config.es.iterations
        rows = (task.heldout or task.train)[: config.log.kl_prompts]
        # Answers are compared by their likelihood, not by a reward.
        constant = Component("constant", _constant)
        kl_task = Task("kl", rows, (), task.make_prompt, (constant,), metric="log_likelihood", chat=task.chat)
        self._scorer = Scorer(kl_task, rewards=InProcessRewards([constant]), on_error="exclude")
        self._prompts: PromptBatch | None = None
        self._base: list[float] = []
        self._num_tokens: list[int] = []
        self._known: set[int] = set()

    def resume(self, state: ResumeState) -> None:
        """Take over the probe from the journal, or make it in a new run; a collective of all ranks.

        The probe is answered by the centre, which in a new run must still be the base model.
        """
        self._known = {state.first_iteration} if state.has_kl else set()
        if not self._every:
            return
        record = state.kl_probe
        if record is None:
            # The gather mode is chosen for what the run asks, not for these few prompts.
            self._rollout.begin()
            record = self._sample()
            self._recorder.record(record)
        self._prompts = self._evaluator.prepare_pairs(record["pairs"], scorer=self._scorer)
        self._base = record["log_likelihoods"]
        self._num_tokens = [len(answer) for _, answer in record["pairs"]]

    def measure_if_due(self, iteration: int) -> None:
        """Record an estimate for the centre after ``iteration`` updates, if that is due; a collective."""
        is_last = iteration == self._num_iterations
        if self._every and (is_last or iteration % self._every == 0) and iteration not in self._known:
            self._recorder.record({"type": "kl", "iteration": iteration, "kl": self._measure()})

    def _sample(self) -> dict[str, Any]:
        """Generate the base model's answers, while the centre is the base model; a collective of all ranks.

        Returns:
            ``probe`` record of the journal: token ids of prompts and answers (``pairs``), and each answer's
            mean log-likelihood per token, in nats (``log_likelihoods``).
        """
        sampled = self._evaluator.sampled()
        prompts = sampled.prepare(self._scorer.task.train, iteration=0, scorer=self._scorer)
        found = self._rollout.scheduler.evaluate_centre(prompts, evaluator=sampled, keeps_samples=True)
        sampled.engine.release()
        parts = self._world.gather_json({index: sample.token_ids for index, sample in found.samples.items()})
        answers = {int(index): tokens for part in parts for index, tokens in part.items()}
        tokens = self._evaluator.tokens_of(self._scorer.task)
        pairs = [[tokens[index], answers[index]] for index in sorted(answers) if answers[index]]
        record: dict[str, Any] = {"type": "probe", "pairs": pairs}
        return record | {"log_likelihoods": self._log_likelihoods_of(pairs)}

    def _measure(self) -> float | None:
        """Compute the divergence; a collective of all ranks.

        Returns:
            Nats per token; None if all answers are empty, or the centre's logits are not finite.
        """
        assert self._prompts is not None, "resume comes first"
        total = sum(self._num_tokens)
        if not total:
            return None
        now = self._log_likelihoods(self._prompts)
        pairs = zip(self._num_tokens, self._base, now, strict=True)
        divergence = sum(number * (base - value) for number, base, value in pairs) / total
        return divergence if math.isfinite(divergence) else None

    def _log_likelihoods_of(self, pairs: Sequence[Sequence[list[int]]]) -> list[float]:
        prepare = self._evaluator.prepare_pairs
        return self._log_likelihoods(prepare(pairs, scorer=self._scorer)) if pairs else []

    def _log_likelihoods(self, prompts: PromptBatch) -> list[float]:
        """Compute each answer's mean log-likelihood under the centre, in nats per token; NaN: not finite."""
        found = self._rollout.scheduler.evaluate_centre(prompts)
        return [float("nan") if value is None else value for value in found.components["log_likelihood"]]


def _constant(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]
