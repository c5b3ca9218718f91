"""The training loop: Algorithm 1 of Qiu et al. 2025 (arXiv 2509.24372), over shards."""

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardes.distributed.consistency import check_consistency, shared_settings
from shardes.errors import UserError
from shardes.es.member import MemberResult, apply_reward_error_policy, mean_reward, member_rewards
from shardes.es.reward_stats import reward_stats
from shardes.es.strategy import Strategy, reward_table
from shardes.es.update import Update
from shardes.evaluation.kl import KLEstimator
from shardes.export.writer import export_model
from shardes.rewards.pool import RewardRunner
from shardes.rollout.autotune import resolve_auto
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.lowrank.check import check_hooks
from shardes.rollout.prompts import PromptBatch
from shardes.runs.directory import RunDirectory
from shardes.runs.reporting import Callbacks, Reporter, peak_memory_bytes
from shardes.runs.resume import restore_weights
from shardes.runs.snapshot_writer import SnapshotWriter
from shardes.session import Session, make_evaluator, make_scheduler
from shardes.tasks.base import Row, Task
from shardes.tasks.data import rows_sha256
from shardes.tasks.sampler import draw_batch
from shardes.weights.update_stats import UpdateStats, update_stats

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRunResult:
    """What became of a member that was evaluated for trial.

    Attributes:
        result: What it earned.
        seconds: How long that took.
        mode_name: How it was evaluated.
        micro_batch_size: Prompts per forward that a run would have.
        peak_memory_bytes: The most memory that this rank has used so far.
    """

    result: MemberResult
    seconds: float
    mode_name: str
    micro_batch_size: int
    peak_memory_bytes: int


class TrainingLoop:
    """Runs ES until the configured number of iterations, from wherever the run directory stands.

    Args:
        session: The model with its base weights.
        task: What it is trained on.
        rewards: Where rewards run; None: in this process.
        heldout_sets: Further tasks by name, on whose rows the centre is evaluated, too.
        callbacks: Who is told of the run as it goes on.

    Attributes:
        run: The run directory, on rank 0; None elsewhere.
    """

    def __init__(
        self,
        session: Session,
        task: Task,
        *,
        rewards: RewardRunner | None = None,
        heldout_sets: Mapping[str, Task] | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._task = task
        self._session = session
        self._config = session.config
        self._world = session.mesh.world
        self._weights = session.weights
        self._timer = session.timer
        heldout_sets = heldout_sets or {}
        self._rollout, self._scorer, scorers = make_evaluator(
            session, task, rewards=rewards, others=heldout_sets
        )
        num_elements = sum(shard.num_elements for shard in session.weights.trained)
        self._strategy = Strategy(self._config.es, num_elements=num_elements)
        self._config = resolve_auto(
            self._config,
            self._rollout,
            rows=task.train,
            first_rows=self._draw_problems(0),
            population=self._strategy.num_members(0),
            mesh=session.mesh,
        )
        self._check_hooks()
        self._population = make_scheduler(session, self._rollout)
        self._heldout = self._rollout.prepare(task.heldout, iteration=0) if task.heldout else None
        self._heldout_sets = {
            name: self._rollout.prepare(other.train, iteration=0, scorer=scorers[name])
            for name, other in heldout_sets.items()
        }
        if self._heldout is None and not self._heldout_sets and self._config.eval.every:
            logger.info("no held-out evaluation: neither task.heldout_data nor eval.sets is given")
        # What the journal knows of the first iteration to do: the job died in the middle of it.
        self._known_results: dict[tuple[int, int], MemberResult] = {}
        self._known_evaluation: int | None = None
        self._known_heldout_reward: float | None = None
        self._best_reward: float | None = None
        self._known_kls: set[int] = set()
        self._kl = KLEstimator(
            self._rollout,
            self._population,
            task=task,
            rows=(task.heldout or task.train)[: self._config.log.kl_prompts],
            world=session.mesh.world,
        )
        self._settings = self._config.resume_fingerprint(data_sha256=rows_sha256(task.train))
        self._snapshots = SnapshotWriter(
            self._config.run.dir,
            every=self._config.run.snapshot_every,
            keep=self._config.run.keep_snapshots,
            mesh=session.mesh,
            weights=session.weights,
            is_sharded=session.backend.is_sharded,
        )
        self._reporter = Reporter(
            self._config,
            is_main=self._world.is_main,
            device=self._world.device,
            timer=self._timer,
            callbacks=callbacks,
        )
        self.run: RunDirectory | None = None

    def train(self) -> None:
        """Trains; a collective.

        Raises:
            UserError: The run directory cannot be used, too few members could be judged, or an update would
                be too large. Whatever was recorded before is kept.
            StorageError: A file of the run cannot be written.
        """
        check_consistency(self._world, **shared_settings(self._config.model_dump()) | self._settings)
        try:
            first = self._open_run()
            with self._reporter.bar(first):
                for iteration in range(first, self._config.es.iterations):
                    self._measure_kl_if_due(iteration)
                    self._evaluate_centre_if_due(iteration)
                    spec = IterationSpec(
                        iteration, self._draw_problems(iteration), self._rollout, self._strategy
                    )
                    results = self._evaluate_members(spec)
                    update = self._decide_update(spec, results)
                    self._update(update)
            self._finish()
        finally:
            self._snapshots.close()
            self._reporter.close()
            if self.run is not None:
                self.run.close()

    def dry_run(self, num_problems: int) -> DryRunResult:
        """Evaluates the first member on a few problems, in the mode that training would have; a collective.

        Nothing is written, and the weights stay as they are.
        """
        rows = self._draw_problems(0)
        self._rollout.begin(self._rollout.prepare(rows, iteration=0))
        spec = IterationSpec(0, rows[:num_problems], self._rollout, self._strategy)
        start = time.monotonic()
        results = self._population.evaluate_members([0], spec=spec, on_result=lambda _: None)
        return DryRunResult(
            results[0],
            seconds=time.monotonic() - start,
            mode_name=self._rollout.mode.name,
            micro_batch_size=self._rollout.micro_batch_size,
            peak_memory_bytes=peak_memory_bytes(self._world.device),
        )

    def _evaluate_members(self, spec: IterationSpec) -> list[MemberResult]:
        """What every member earned."""
        iteration, members = spec.iteration, spec.members
        known = {member: result for (of, member), result in self._known_results.items() if of == iteration}

        every = self._config.log.samples_every
        shows_samples = every > 0 and iteration % every == 0
        self._reporter.begin_members(len(members), num_known=len(known))

        def record(result: MemberResult) -> None:
            if self.run is not None and shows_samples:
                # Before the journal entry: without one they are dropped and written again after a crash.
                for sample in result.samples:
                    self.run.samples.write({"iteration": iteration, "member": result.member, **sample})
            self._record({"type": "member", "iteration": iteration, **result.record()})
            self._reporter.end_member(result.num_tokens)

        results = self._population.evaluate_members(
            [member for member in members if member not in known], spec=spec, on_result=record
        )
        return [(known | results)[member] for member in members]

    def _decide_update(self, spec: IterationSpec, results: list[MemberResult]) -> Update:
        """Rewards to coefficients, and these to disk."""
        config, iteration = self._config, spec.iteration
        rewards = member_rewards(results, on_error=config.task.on_reward_error)
        num_nonfinite = sum(not result.is_finite for result in results)
        self._check_enough_rewards(rewards, iteration=iteration, num_nonfinite=num_nonfinite)
        shaped = self._strategy.shaped(rewards, results)
        update = self._strategy.update(shaped, iteration=iteration)
        sigma = self._strategy.sigma(iteration)
        check_consistency(
            self._world,
            iteration=iteration,
            seed_and_sigma=[config.es.seed, sigma],
            prompts=spec.problems.fingerprint(),
            update=update.record(),
        )
        if self._world.is_main and not any(update.coefficients):
            logger.warning(
                "iteration %d: all members earned the same, so there is nothing to learn from them; a larger "
                "es.sigma, or a reward that tells bad answers apart, would help",
                iteration,
            )
        self._check_step(update)
        with self._timer("snapshot"):
            self._snapshots.finish()
        if self._world.is_main:
            instruments = reward_stats(reward_table(results), rewards=rewards, shaped=shaped)
            record = {"type": "update", **update.record(), "sigma": sigma, "instruments": instruments}
            self._record(record, durable=True)
        return update

    def _update(self, update: Update) -> None:
        """Moves the weights, and says what the iteration was."""
        self._move_weights(update)
        self._reporter.end_iteration(update.iteration, gather=self._rollout.mode_name)

    def _move_weights(self, update: Update) -> None:
        """Moves the weights, measuring that if it is due, and records what they became."""
        every = self._config.log.instruments_every
        stats = None
        if every and update.iteration % every == 0 and self._weights.moves(update):
            stats = UpdateStats(self._world.device)
        with self._timer("update"):
            self._weights.update(update, stats=stats)
        self._keep_weights(update.iteration + 1, stats=stats)

    def _check_enough_rewards(
        self, rewards: list[float | None], *, iteration: int, num_nonfinite: int
    ) -> None:
        """Ends the run if too few members could be judged to learn from them."""
        num_judged = sum(reward is not None for reward in rewards)
        wanted = max(1, math.ceil(self._config.es.min_valid_fraction * len(rewards)))
        if num_judged >= wanted:
            return
        causes = []
        if num_failed := len(rewards) - num_judged - num_nonfinite:
            first = self._scorer.first_failure or "None for every answer, or what another rank warns of"
            causes.append(
                f"task.reward: {num_failed} had no answer that could be scored; the first failure was {first}"
            )
        if num_nonfinite:
            causes.append(
                f"es.sigma: {num_nonfinite} had logits that are not finite, which a smaller one, or a wider "
                "model.dtype, may prevent"
            )
        raise UserError(
            f"{num_judged} of the {len(rewards)} members of iteration {iteration} could be judged; wanted at "
            f"least {wanted} (es.min_valid_fraction). {'; '.join(causes)}. Mend that and start again: "
            "nothing is lost"
        )

    def _check_step(self, update: Update) -> None:
        """Refuses an update after which a weight might not be finite, before anything of it is recorded."""
        if self._world.any(self._weights.could_overflow(update)):
            raise UserError(
                f"es.alpha: the update of iteration {update.iteration} could make a weight too large for its "
                "dtype, or one is not finite already. Nothing of it was recorded: the weights before it can "
                "be exported. Give another run.dir, and a smaller es.alpha or a wider model.dtype"
            )

    def _keep_weights(self, iteration: int, *, stats: UpdateStats | None) -> None:
        """Records what the weights became, and takes a snapshot of them if one is due.

        Args:
            iteration: How many updates they have had.
            stats: What was measured of the last, on this rank.
        """
        is_due = self._snapshots.is_due(iteration)
        record: dict[str, Any] = {"type": "weights", "iteration": iteration}
        with self._timer("digest"):
            digest = self._session.digest(compare=iteration % self._config.run.check_every == 0)
            if stats is not None:
                record["instruments"] = update_stats(self._session.summed(stats.sums()))
        # On disk before the snapshot is, because it is what the snapshot will be checked against.
        self._record(record | {"digest": digest}, durable=is_due)
        if is_due:
            with self._timer("snapshot"):
                states_digest = self._session.combined(self._weights.states_digest())
                self._snapshots.begin(iteration, digest=digest, states_digest=states_digest)

    def _draw_problems(self, iteration: int) -> list[Row]:
        """The iteration's problems."""
        drawn = draw_batch(
            len(self._task.train),
            batch_size=self._config.task.batch_size,
            sampling=self._config.task.sampling,
            seed=self._config.es.seed,
            iteration=iteration,
        )
        return [self._task.train[row] for row in drawn]

    def _measure_kl_if_due(self, iteration: int) -> None:
        """How far the centre has moved from the base model, every few iterations and at the end."""
        every, is_last = self._config.log.kl_every, iteration == self._config.es.iterations
        if every and (is_last or iteration % every == 0) and iteration not in self._known_kls:
            self._record({"type": "kl", "iteration": iteration, "kl": self._kl.measure()})

    def _evaluate_centre_if_due(self, iteration: int) -> None:
        """Held-out rewards after ``iteration`` updates, every few iterations and at the end."""
        every = self._config.eval.every
        is_last = iteration == self._config.es.iterations
        if every == 0 or not (is_last or iteration % every == 0):
            return
        if self._heldout is None and not self._heldout_sets:
            return
        if iteration == self._known_evaluation:
            self._save_if_best(iteration, self._known_heldout_reward)
            return
        record: dict[str, Any] = {"type": "evaluation", "iteration": iteration}
        if self._heldout is not None:
            record |= self._evaluate_centre(iteration, self._heldout, name=None)
        sets = {
            name: self._evaluate_centre(iteration, problems, name=name)
            for name, problems in self._heldout_sets.items()
        }
        if sets:
            record["sets"] = sets
        self._record(record)
        self._reporter.end_evaluation(iteration)
        self._save_if_best(iteration, record.get("reward"))

    def _evaluate_centre(self, iteration: int, problems: PromptBatch, *, name: str | None) -> dict[str, Any]:
        """What the centre earns on some held-out problems; samples of its answers are written."""
        evaluation = self._population.evaluate_centre(problems)
        on_error = self._config.task.on_reward_error
        rewards = apply_reward_error_policy(evaluation.rewards, evaluation.has_failed, on_error=on_error)
        reward = mean_reward(rewards) if evaluation.is_finite else None
        if self.run is not None:
            if not evaluation.is_finite:
                logger.warning("iteration %d: the logits of the centre are not finite", iteration)
            # Samples first: those without a journal entry are dropped and written again after a crash.
            of = {} if name is None else {"set": name}
            for sample in evaluation.samples.values():
                self.run.samples.write({"iteration": iteration, **of, **vars(sample)})
        components = evaluation.component_means()
        return {"reward": reward, "num_failures": evaluation.num_failures, "components": components}

    def _save_if_best(self, iteration: int, reward: float | None) -> None:
        """Exports the centre if it is the best yet, and if that is wanted; a collective."""
        if not self._config.eval.save_best or reward is None:
            return
        if self._best_reward is not None and reward <= self._best_reward:
            return
        self._best_reward = reward
        best = self._config.run.dir / "best"
        with self._timer("io"):
            if self._world.is_main:
                shutil.rmtree(best, ignore_errors=True)
            self._world.barrier()
            history = None if self.run is None else self.run.history
            export_model(self._session, best, iteration=iteration, settings=self._settings, history=history)

    def _finish(self) -> None:
        """Evaluates the final weights, and leaves the model at them."""
        last = self._config.es.iterations
        self._measure_kl_if_due(last)
        self._evaluate_centre_if_due(last)
        with self._timer("snapshot"):
            self._snapshots.finish()
        self._weights.centre()
        self._reporter.finish(weights_digest=self._session.digest())

    def _record(self, record: dict[str, Any], *, durable: bool = False) -> None:
        """Appends to the journal, on the rank that keeps it."""
        if self.run is not None:
            with self._timer("io"):
                self.run.record(record, durable=durable)

    def _check_hooks(self) -> None:
        """In a batched mode, refuses terms that compute other members than weights do; a collective."""
        if not self._config.rollout.is_batched:
            return
        self._rollout.begin(self._rollout.prepare(self._draw_problems(0), iteration=0))
        check_hooks(
            self._rollout.mode,
            backend=self._session.backend,
            weights=self._weights,
            world=self._world,
            sigma=self._config.es.sigma,
        )

    def _open_run(self) -> int:
        """Opens the run directory and restores what it holds; returns the first iteration to do."""
        state: dict[str, Any] = {}
        if self._world.is_main:
            try:
                header = {
                    "type": "header",
                    **self._session.identity,
                    "settings": self._settings,
                    "config": self._config.model_dump(mode="json"),
                }
                self.run = RunDirectory(self._config, header=header)
                self._reporter.open(self.run)
                history = self.run.history
                first = len(history.updates)
                state = {
                    "updates": history.updates,
                    "digests": list(history.digests.items()),
                    "pending": list(history.members.get(first, {}).values()),
                    "evaluation": history.evaluations.get(first),
                    "best_reward": history.best_reward(before=first),
                    "probe": history.probe,
                    "has_kl": first in history.kls,
                }
            except UserError as error:
                state = {"error": str(error)}
        state = self._world.broadcast_json(state)
        if "error" in state:
            raise UserError(state["error"])
        self._snapshots.open()
        first, digests = len(state["updates"]), dict(state["digests"])
        self._known_kls = {first} if state["has_kl"] else set()
        if self._config.log.kl_every:
            self._kl.use(state["probe"] or self._draw_kl_probe())
        # The job died before it had recorded what the last update made of the weights: that is done again.
        is_cut_off = first > 0 and first not in digests
        updates = state["updates"]
        restore_weights(
            self._session,
            updates[:-1] if is_cut_off else updates,
            digests=digests,
            run_dir=self._config.run.dir,
            sets_damaged_aside=True,
        )
        if is_cut_off:
            self._move_weights(Update.of_record(updates[-1]))
        if state["evaluation"] is not None:
            self._known_evaluation = first
            self._known_heldout_reward = state["evaluation"].get("reward")
        self._best_reward = state["best_reward"]
        # A member without a reward is asked again: the user may have mended the reward function.
        self._known_results = {
            (first, record["member"]): MemberResult.of_record(record)
            for record in state["pending"]
            if record["reward"] is not None
        }
        self._reporter.catch_up()
        return first

    def _draw_kl_probe(self) -> dict[str, Any]:
        """Has the base model, which the centre still is, answer for comparisons to come."""
        # The mode is chosen for what the run asks, not for the few prompts of the probe.
        self._rollout.begin(self._rollout.prepare(self._draw_problems(0), iteration=0))
        record = self._kl.draw()
        self._record(record)
        return record
