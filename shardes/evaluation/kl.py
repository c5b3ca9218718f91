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
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.scheduler import MemberScheduler
from shardes.runs.recorder import RunRecorder
from shardes.runs.resume import ResumeState
from shardes.tasks.base import Component, Row, Task


class AnswerLikelihoods:
    """Likelihoods of answers to a task's prompts, under the weights that a scheduler evaluates.

    Args:
        evaluator: Evaluator of the scheduler.
        scheduler: Scheduler over the ranks.
        task: Task whose prompts are answered.
        rows: Problems that are asked.
        world: All ranks of the job.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        scheduler: MemberScheduler,
        *,
        task: Task,
        rows: Sequence[Row],
        world: Group,
    ) -> None:
        self._evaluator, self._scheduler, self._world = evaluator, scheduler, world
        # Answers are compared by their likelihood, not by a reward.
        constant = Component("constant", _constant)
        kl_task = Task("kl", rows, (), task.make_prompt, (constant,), metric="log_likelihood", chat=task.chat)
        self._scorer = Scorer(kl_task, rewards=InProcessRewards([constant]), on_error="exclude")

    def sample(self) -> dict[int, list[list[int]]]:
        """Draw an answer to each prompt, at temperature 1; a collective of all ranks.

        Returns:
            Token ids of prompt and answer by the row's index, without answers that are empty.
        """
        sampled = self._evaluator.sampled()
        prompts = sampled.prepare(self._scorer.task.train, iteration=0, scorer=self._scorer)
        found = self._scheduler.evaluate_centre(prompts, evaluator=sampled, keeps_samples=True)
        sampled.engine.release()
        parts = self._world.gather_json({index: sample.token_ids for index, sample in found.samples.items()})
        answers = {int(index): tokens for part in parts for index, tokens in part.items()}
        tokens = self._evaluator.tokens_of(self._scorer.task)
        return {index: [tokens[index], answers[index]] for index in sorted(answers) if answers[index]}

    def prepare(self, pairs: Sequence[Sequence[list[int]]]) -> PromptBatch:
        """Build the batch that asks for the likelihoods of given answers.

        Args:
            pairs: Token ids of each prompt and of its answer; at least one.
        """
        return self._evaluator.prepare_pairs(pairs, scorer=self._scorer)

    def log_likelihoods(self, prompts: PromptBatch) -> list[float]:
        """Compute each answer's mean log-likelihood, in nats per token; a collective of all ranks.

        Returns:
            One for each pair of ``prepare``; NaN where logits are not finite.
        """
        found = self._scheduler.evaluate_centre(prompts)
        return [float("nan") if value is None else value for value in found.components["log_likelihood"]]


class KLEstimator:
    """Estimator of the divergence on a few prompts, every ``log.kl_every`` iterations and at the end.

    Args:
        rollout: Parts that evaluate members and the centre.
        recorder: Recorder of the base model's answers and of the estimates.
        world: All ranks of the job.
    """

    def __init__(self, rollout: Rollout, *, recorder: RunRecorder, world: Group) -> None:
        self._rollout = rollout
        self._recorder = recorder
        config, task = rollout.config, rollout.task
        self._every, self._num_iterations = config.log.kl_every, config.es.iterations
        rows = (task.heldout or task.train)[: config.log.kl_prompts]
        self._answers = AnswerLikelihoods(
            rollout.evaluator, rollout.scheduler, task=task, rows=rows, world=world
        )
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
        self._prompts = self._answers.prepare(record["pairs"])
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
        pairs = list(self._answers.sample().values())
        found = self._answers.log_likelihoods(self._answers.prepare(pairs)) if pairs else []
        return {"type": "probe", "pairs": pairs, "log_likelihoods": found}

    def _measure(self) -> float | None:
        """Compute the divergence; a collective of all ranks.

        Returns:
            Nats per token; None if all answers are empty, or the centre's logits are not finite.
        """
        assert self._prompts is not None, "resume comes first"
        total = sum(self._num_tokens)
        if not total:
            return None
        now = self._answers.log_likelihoods(self._prompts)
        pairs = zip(self._num_tokens, self._base, now, strict=True)
        divergence = sum(number * (base - value) for number, base, value in pairs) / total
        return divergence if math.isfinite(divergence) else None


def _constant(completions: list[str]) -> list[float]:
    return [0.0 for _ in completions]
