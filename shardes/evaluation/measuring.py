"""Measure one of several models that are compared: greedy answers, drawn answers, and divergence."""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardes.config.schema import Config
from shardes.environments.runners import Environments
from shardes.es.member import apply_reward_error_policy
from shardes.evaluation.coverage import passes_of
from shardes.evaluation.drawing import GREEDY, Drawing
from shardes.evaluation.kl import AnswerLikelihoods
from shardes.models.build import load_model_config, positions_of, vocabulary_size
from shardes.rewards.pool import RewardRunner
from shardes.rewards.scorer import Scorer
from shardes.rollout.aggregate import Evaluation
from shardes.rollout.autotune import find_micro_batch_size
from shardes.rollout.build import make_evaluator, make_scheduler
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.preparing import PreparedTasks
from shardes.rollout.scheduler import MemberScheduler
from shardes.session import Session
from shardes.tasks.base import Row, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetResult:
    """Results of one model on one set of problems; lists have one entry for each problem.

    Attributes:
        rows: Index of each problem among those of the set.
        rewards: Reward of the greedy answer; None: it does not count.
        solved: Whether that answer passes; None: it is not known.
        lengths: Tokens of that answer; empty for a likelihood task, which has none.
        num_answers: Number of answers that were drawn and that a reward applies to; empty: none were drawn.
        num_passes: Number of these that pass.
        drawn_rewards: Mean reward of these; None: none counts.
        num_failures: Number of rewards that failed, of greedy and of drawn answers.
        is_finite: Whether all logits were finite.
    """

    rows: Sequence[int]
    rewards: Sequence[float | None]
    solved: Sequence[bool | None]
    lengths: Sequence[int]
    num_answers: Sequence[int] = ()
    num_passes: Sequence[int] = ()
    drawn_rewards: Sequence[float | None] = ()
    num_failures: int = 0
    is_finite: bool = True


@dataclass(frozen=True)
class BaseAnswers:
    """Answers of the base model, by whose likelihood other models are compared with it.

    Attributes:
        vocabulary: Hash of its tokenizer's tokens and their ids.
        pairs: Token ids of prompt and answer, by the problem's index.
        log_likelihoods: Mean log-likelihood of each answer under the base model, in nats per token.
    """

    vocabulary: str
    pairs: Mapping[int, list[list[int]]]
    log_likelihoods: Sequence[float]


@dataclass(frozen=True)
class ModelResult:
    """Results of one model.

    Attributes:
        name: Name by which the model was given.
        iteration: Number of a run's updates; None for a model directory.
        sets: Results by name of the set; the first is the task's own.
        divergences: For each answer of the base model, by how many nats that model finds it likelier, and
            its number of tokens; None: this was not measured.
        no_divergence: Reason why not.
    """

    name: str
    iteration: int | None
    sets: Mapping[str, SetResult]
    divergences: Sequence[tuple[float, int]] | None = None
    no_divergence: str = ""


@dataclass
class Comparison:
    """Measurement of models, one after another, each in a session of its own.

    Attributes:
        config: Configuration that says what all of them are asked.
        drawing: How answers are drawn.
        task: Task whose held-out problems are asked, or its other ones if it has none.
        heldout_sets: Further tasks by name.
        rewards: Runner of the rewards.
        environments: Runners of the episodes, by the settings of greedy answers.
        drawn_environments: The same by the settings of drawn ones, for a task with a harness, whose endpoint
            knows them; for others ``environments`` play these, too.
    """

    config: Config
    drawing: Drawing
    task: Task
    heldout_sets: Mapping[str, Task]
    rewards: RewardRunner | None
    environments: Environments
    drawn_environments: Environments
    _base: BaseAnswers | None = field(default=None, init=False)

    @property
    def main_set(self) -> str:
        """Return the name of the task's own problems, as ``shardes evaluate`` has it."""
        return "heldout" if self.task.heldout else "data"

    def measure(
        self, session: Session, prepared: PreparedTasks, *, name: str, iteration: int | None
    ) -> ModelResult:
        """Measure the model of a session; a collective of all ranks.

        The first one is the base, whose answers the divergence of the others is estimated on.

        Args:
            session: Session whose model is at the weights to measure.
            prepared: The tasks, of which rows may be missing that this model cannot be asked.
            name: Name by which the model was given.
            iteration: Number of a run's updates; None for a model directory.
        """
        session = replace(session, config=self.drawing.settings(session.config))
        task = prepared.task
        evaluator, scorer, scorers = make_evaluator(
            session,
            task,
            rewards=self.rewards,
            environments=self.environments,
            others=prepared.heldout_sets,
            encoder=prepared.encoder,
        )
        rows = task.heldout or task.train
        if session.config.rollout.micro_batch_size == "auto":
            sigma = session.config.es.sigma
            find_micro_batch_size(evaluator, rows, num_rows=len(rows), mesh=session.mesh, sigma=sigma)
        drawn, greedy = evaluator, evaluator.changed(**GREEDY)
        scheduler = make_scheduler(session, evaluator)
        all_rows = self.task.heldout or self.task.train
        main = self._greedy(greedy, scheduler, scorer, rows, all_rows=all_rows)
        if self.drawing.num_answers and task.choices is None:
            greedy.engine.release()
            drawn_scorer = copy.copy(scorer)
            drawn_scorer.environments = self.drawn_environments.of(task) or scorer.environments
            main = self._with_drawn(drawn, scheduler, drawn_scorer, rows, main)
            drawn.engine.release()
        sets = {self.main_set: main}
        for key, other in prepared.heldout_sets.items():
            all_rows = self.heldout_sets[key].train
            sets[key] = self._greedy(greedy, scheduler, scorers[key], other.train, all_rows=all_rows)
        greedy.engine.release()
        likelihoods = AnswerLikelihoods(evaluator, scheduler, task=task, rows=rows, world=session.mesh.world)
        found = self._divergences(session, likelihoods, rows=main.rows, tokenizer=prepared.encoder.tokenizer)
        divergences, reason = (None, found) if isinstance(found, str) else (found, "")
        return ModelResult(name, iteration, sets, divergences, reason)

    def _greedy(
        self,
        evaluator: Evaluator,
        scheduler: MemberScheduler,
        scorer: Scorer,
        rows: Sequence[Row],
        *,
        all_rows: Sequence[Row],
    ) -> SetResult:
        """Evaluate greedy answers, or the likelihoods of given ones; a collective of all ranks."""
        prompts = evaluator.prepare(rows, iteration=0, scorer=scorer)
        found = scheduler.evaluate_centre(prompts, evaluator=evaluator)
        place = {id(row): index for index, row in enumerate(all_rows)}
        choices = scorer.task.choices
        rewards = self._rewards(found)
        solved: list[bool | None]
        if choices is None:
            solved = [None if value is None else value == 1.0 for value in self._passes(found)]
        else:
            accuracies = found.components["accuracy"]
            solved = [
                None if value is None or len(choices(row).completions) == 1 else value == 1.0
                for row, value in zip(rows, accuracies, strict=True)
            ]
        return SetResult(
            rows=[place[id(row)] for row in rows],
            rewards=rewards,
            solved=solved,
            lengths=found.lengths,
            num_failures=found.num_failures,
            is_finite=found.is_finite,
        )

    def _with_drawn(
        self,
        evaluator: Evaluator,
        scheduler: MemberScheduler,
        scorer: Scorer,
        rows: Sequence[Row],
        greedy: SetResult,
    ) -> SetResult:
        """Evaluate answers that are drawn, in one pass; a collective of all ranks."""
        prompts = evaluator.prepare(rows, iteration=0, scorer=scorer)
        found = scheduler.evaluate_centre(prompts, evaluator=evaluator)
        count = self.drawing.num_answers
        passes, rewards = self._passes(found), self._rewards(found)
        firsts = range(0, len(passes), count)
        known = [[value for value in passes[low : low + count] if value is not None] for low in firsts]
        counted = [[value for value in rewards[low : low + count] if value is not None] for low in firsts]
        return replace(
            greedy,
            num_answers=[len(values) for values in known],
            num_passes=[int(sum(values)) for values in known],
            drawn_rewards=[math.fsum(values) / len(values) if values else None for values in counted],
            num_failures=greedy.num_failures + found.num_failures,
            is_finite=greedy.is_finite and found.is_finite,
        )

    def _rewards(self, found: Evaluation) -> list[float | None]:
        on_error = self.config.task.on_reward_error
        return list(apply_reward_error_policy(found.rewards, found.has_failed, on_error=on_error))

    def _passes(self, found: Evaluation) -> list[float | None]:
        pass_reward = self.config.eval.pass_reward
        return passes_of(self._rewards(found), found.has_failed, pass_reward=pass_reward)

    def _divergences(
        self, session: Session, likelihoods: AnswerLikelihoods, *, rows: Sequence[int], tokenizer: Any
    ) -> list[tuple[float, int]] | str:
        """Estimate the divergence from the base on each of its answers; a collective of all ranks.

        Returns:
            Nats and tokens of each answer; or the reason why there is no estimate.
        """
        if self.task.episodes is not None:
            return "the problems are episodes, whose prompts are not known before they are played"
        vocabulary = _vocabulary_hash(tokenizer)
        base = self._base
        if base is None:
            drawn = likelihoods.sample()
            pairs = {rows[index]: pair for index, pair in drawn.items()}
        elif reason := _difference(session, base, vocabulary):
            return reason
        else:
            pairs = dict(base.pairs)
        if not pairs:
            return "all answers of the base are empty"
        now = likelihoods.log_likelihoods(likelihoods.prepare(list(pairs.values())))
        if base is None:
            base = self._base = BaseAnswers(vocabulary, pairs, now)
        before = base.log_likelihoods
        if not all(map(math.isfinite, [*before, *now])):
            return "logits are not finite"
        return [
            (len(answer) * (old - new), len(answer))
            for (_, answer), old, new in zip(pairs.values(), before, now, strict=True)
        ]


def _vocabulary_hash(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's tokens and their ids."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _difference(session: Session, base: BaseAnswers, vocabulary: str) -> str:
    """Return the reason why a model cannot be asked about the base model's tokens; empty: it can."""
    if vocabulary != base.vocabulary:
        return "its tokenizer has other tokens than the base's"
    model = session.config.model
    config = load_model_config(model.directory, trust_remote_code=model.trust_remote_code)
    most_tokens, most_positions = vocabulary_size(config), positions_of(config)
    largest = max((max(prompt + answer) for prompt, answer in base.pairs.values()), default=0)
    if most_tokens is not None and largest >= most_tokens:
        return f"it has {most_tokens} tokens, and the base has answered with number {largest}"
    longest = max((len(prompt) + len(answer) for prompt, answer in base.pairs.values()), default=0)
    if most_positions is not None and longest > most_positions:
        return f"it was made for {most_positions} tokens, and prompt and answer of the base have {longest}"
    return ""
