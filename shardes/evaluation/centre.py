"""Evaluate the centre on held-out problems during a run, and export the best one."""

import logging
import shutil
from collections.abc import Mapping
from typing import Any

from shardes.es.member import apply_reward_error_policy, mean_reward
from shardes.export.writer import export_model
from shardes.rollout.build import Rollout
from shardes.rollout.prompts import PromptBatch
from shardes.runs.recorder import RunRecorder
from shardes.runs.reporting import Reporter
from shardes.runs.resume import ResumeState
from shardes.session import Session
from shardes.tasks.base import Task

logger = logging.getLogger(__name__)


class CentreEvaluator:
    """Evaluator of the centre, every ``eval.every`` iterations and at the end.

    Args:
        session: Session that holds the model.
        rollout: Parts that evaluate members and the centre.
        heldout_sets: Further tasks by name (``eval.sets``), on whose rows the centre is evaluated, too.
        recorder: Recorder of the journal and of samples.
        reporter: Reporter that writes the rewards to metrics.
    """

    def __init__(
        self,
        session: Session,
        rollout: Rollout,
        *,
        heldout_sets: Mapping[str, Task],
        recorder: RunRecorder,
        reporter: Reporter,
    ) -> None:
        self._session = session
        self._config = rollout.config
        self._scheduler = rollout.scheduler
        self._objective = rollout.objective
        self._recorder = recorder
        self._reporter = reporter
        evaluator, task = rollout.evaluator, rollout.task
        self._heldout = evaluator.prepare(task.heldout, iteration=0) if task.heldout else None
        self._sets = {
            name: evaluator.prepare(other.train, iteration=0, scorer=rollout.set_scorers[name])
            for name, other in heldout_sets.items()
        }
        self._known: dict[int, float | None] = {}
        self._best_reward: float | None = None
        if self._heldout is None and not self._sets and self._config.eval.every:
            logger.info("no held-out evaluation: neither task.heldout_data nor eval.sets is given")

    def resume(self, state: ResumeState) -> None:
        """Take over the best reward and the last evaluation from the journal."""
        self._best_reward = state.best_reward
        if state.evaluation is not None:
            self._known = {state.first_iteration: state.evaluation.get("reward")}

    def evaluate_if_due(self, iteration: int) -> None:
        """Evaluate the centre after ``iteration`` updates, if that is due; a collective of all ranks."""
        every, is_last = self._config.eval.every, iteration == self._config.es.iterations
        if every == 0 or not (is_last or iteration % every == 0):
            return
        if self._heldout is None and not self._sets:
            return
        if iteration not in self._known:
            self._known = {iteration: self._evaluate(iteration)}
        self._save_if_best(iteration, self._known[iteration])

    def _evaluate(self, iteration: int) -> float | None:
        """Return the mean reward on the task's own held-out problems, and record those of all sets."""
        record: dict[str, Any] = {"type": "evaluation", "iteration": iteration}
        if self._heldout is not None:
            record |= self._rewards(iteration, self._heldout)
        sets = {name: self._rewards(iteration, prompts, set=name) for name, prompts in self._sets.items()}
        if sets:
            record["sets"] = sets
        self._recorder.record(record)
        self._reporter.end_evaluation(iteration)
        return record.get("reward")

    def _rewards(self, iteration: int, prompts: PromptBatch, **place: str) -> dict[str, Any]:
        """Evaluate the centre on some held-out problems, and write samples of its answers.

        Returns:
            Fields of an ``evaluation`` record: mean reward (None if logits are not finite), the objective's
            value if that is not the mean, number of failed rewards, and means of components.
        """
        evaluation = self._scheduler.evaluate_centre(prompts)
        on_error = self._config.task.on_reward_error
        rewards = apply_reward_error_policy(evaluation.rewards, evaluation.has_failed, on_error=on_error)
        if not evaluation.is_finite and self._session.mesh.world.is_main:
            logger.warning("iteration %d: the logits of the centre are not finite", iteration)
        samples = map(vars, evaluation.samples.values())
        self._recorder.write_samples(samples, iteration=iteration, **place)
        objective, count = self._objective, prompts.samples_per_prompt
        by_objective: dict[str, Any] = {}
        if not objective.is_mean and prompts.choices is None:
            by_problem = objective.of_problems(rewards, samples_per_prompt=count)
            by_objective = {"objective": mean_reward(by_problem) if evaluation.is_finite else None}
        return {
            "reward": mean_reward(rewards) if evaluation.is_finite else None,
            **by_objective,
            "num_failures": evaluation.num_failures,
            "components": evaluation.component_means(),
        }

    def _save_if_best(self, iteration: int, reward: float | None) -> None:
        """Export the centre if it is the best yet, and if that is wanted; a collective of all ranks."""
        if not self._config.eval.save_best or reward is None:
            return
        if self._best_reward is not None and reward <= self._best_reward:
            return
        self._best_reward = reward
        best, world = self._config.run.dir / "best", self._session.mesh.world
        with self._session.timer("io"):
            if world.is_main:
                shutil.rmtree(best, ignore_errors=True)
            world.barrier()
            export_model(
                self._session,
                best,
                iteration=iteration,
                settings=self._recorder.settings,
                history=self._recorder.history,
            )
