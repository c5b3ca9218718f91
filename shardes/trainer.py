"""The training loop: Algorithm 1 of Qiu et al. 2025 (arXiv 2509.24372), over shards."""

import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardes.config.fingerprint import resume_fingerprint
from shardes.distributed.consistency import check_consistency, shared_settings
from shardes.environments.runners import Environments
from shardes.errors import UserError
from shardes.es.member import MemberResult, check_enough_rewards
from shardes.es.population import PopulationResult, decide_update
from shardes.es.step_rule import WINDOW
from shardes.es.update import Update
from shardes.evaluation.centre import CentreEvaluator
from shardes.evaluation.kl import KLEstimator
from shardes.rewards.pool import RewardRunner
from shardes.rollout.build import Rollout, make_rollout
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.racing import PortionKey
from shardes.runs.journal import recorded_setting
from shardes.runs.member_records import MemberRecords
from shardes.runs.recorder import RunRecorder
from shardes.runs.reporting import Callbacks, Reporter
from shardes.runs.resume import ResumeState, restore_weights
from shardes.runs.snapshot_writer import SnapshotWriter
from shardes.session import Session
from shardes.tasks.base import Task
from shardes.tasks.data import rows_sha256
from shardes.weights.master_digest import optimizer_digest
from shardes.weights.update_stats import UpdateStats, update_stats

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Runs ES until the configured number of iterations, from wherever the run directory stands.

    Args:
        session: The model with its base weights.
        rollout: Evaluates members and the centre.
        centre: Evaluates the centre on held-out problems.
        kl: Estimates how far the centre's answers have moved.
        recorder: Opens the run directory and writes to it.
        snapshots: Writes snapshots of the weights.
        reporter: Tells people and trackers how the run goes on.
    """

    def __init__(
        self,
        session: Session,
        rollout: Rollout,
        *,
        centre: CentreEvaluator,
        kl: KLEstimator,
        recorder: RunRecorder,
        snapshots: SnapshotWriter,
        reporter: Reporter,
    ) -> None:
        self._session, self._rollout = session, rollout
        self._config, self._strategy = rollout.config, rollout.strategy
        self._world, self._weights, self._timer = session.mesh.world, session.weights, session.timer
        self._centre, self._kl = centre, kl
        self._recorder, self._snapshots, self._reporter = recorder, snapshots, reporter
        # Members of the first iteration that the journal knows: the job before died in the middle of it.
        self._known_results: dict[int, MemberResult] = {}
        self._known_portions: dict[PortionKey, dict[str, Any]] = {}
        # Records of the last updates, the same on every rank: what a step may depend on besides its rewards.
        self._past: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)

    def train(self) -> None:
        """Train; a collective of all ranks.

        Raises:
            UserError: The run directory cannot be used, too few members could be judged, or an update would
                be too large. Whatever was recorded before is kept.
            StorageError: A file of the run cannot be written.
            Stopped: The job was asked to stop.
        """
        check_consistency(self._world, **shared_settings(self._config.model_dump()) | self._recorder.settings)
        try:
            first = self._resume(self._recorder.open(self._reporter.open))
            with self._reporter.bar(first):
                for iteration in range(first, self._config.es.iterations):
                    self._kl.measure_if_due(iteration)
                    self._centre.evaluate_if_due(iteration)
                    spec = self._rollout.spec(iteration)
                    population = self._evaluate_members(spec)
                    update = self._decide_update(spec, population)
                    self._apply(update)
                    self._reporter.end_iteration(iteration, self._rollout.measured())
            self._finish()
        finally:
            self._snapshots.close()
            self._reporter.close()
            self._recorder.close()

    def _resume(self, state: ResumeState) -> int:
        """Restore what the run directory holds; return the first iteration to do."""
        self._snapshots.open()
        self._session.use_update_version(state.update_version)
        self._kl.resume(state)
        # Cut off: the job died before it had recorded what the last update made of the weights.
        updates = state.updates[:-1] if state.is_cut_off else state.updates
        run_dir = self._config.run.dir
        restore_weights(
            self._session, updates, digests=state.digests, run_dir=run_dir, sets_damaged_aside=True
        )
        if state.is_cut_off:
            self._apply(Update.of_record(state.updates[-1]))
        self._centre.resume(state)
        self._known_results, self._known_portions = state.results, state.portions
        self._rollout.resume(state.updates)
        self._past.extend(state.updates)
        self._reporter.catch_up()
        return state.first_iteration

    def _evaluate_members(self, spec: IterationSpec) -> PopulationResult:
        """Return what every member earned, recording each as soon as it is known."""
        known, self._known_results = self._known_results, {}
        portions, self._known_portions = self._known_portions, {}
        every = self._config.log.samples_every
        shows_samples = every > 0 and spec.iteration % every == 0
        records = MemberRecords(
            spec.iteration, shows_samples=shows_samples, recorder=self._recorder, reporter=self._reporter
        )
        self._reporter.begin_members(len(spec.members), num_known=len(known))
        scheduler, race = self._rollout.scheduler, self._rollout.race(spec)
        if race is not None:
            stopped = partial(records.add_stopped, known=known)
            return race.run(scheduler, known=portions, on_portion=records.add_portion, on_result=stopped)
        members = [member for member in spec.members if member not in known]
        results = known | scheduler.evaluate_members(members, spec=spec, on_result=records.add)
        in_order = [results[member] for member in spec.members]
        return PopulationResult.of(in_order, on_error=self._config.task.on_reward_error)

    def _decide_update(self, spec: IterationSpec, population: PopulationResult) -> Update:
        """Turn rewards into coefficients, and have these on disk before the weights move."""
        iteration, es = spec.iteration, self._config.es
        check_enough_rewards(
            population.rewards,
            population.results,
            iteration=iteration,
            min_valid_fraction=es.min_valid_fraction,
            first_failure=self._rollout.scorer.first_failure,
            is_episodic=self._rollout.task.episodes is not None,
        )
        decision = decide_update(
            self._strategy, population, iteration=iteration, weights=spec.weights, past=self._past
        )
        check_consistency(
            self._world,
            iteration=iteration,
            seed_and_sigma=[es.seed, self._strategy.sigma(iteration)],
            prompts=spec.prompts.fingerprint(),
            update=decision.update.record(),
        )
        if self._world.is_main and not decision.has_signal:
            logger.warning(
                "iteration %d: all members earned the same, so there is nothing to learn from them; a larger "
                "es.sigma, or a reward that tells bad answers apart, would help",
                iteration,
            )
        self._check_step(decision.update)
        with self._timer("snapshot"):
            self._snapshots.finish()
        record = {**decision.record, **self._rollout.learn(spec, population.table)}
        self._recorder.record(record, durable=True)
        self._past.append(record)
        return decision.update

    def _check_step(self, update: Update) -> None:
        """Refuse an update after which a weight might not be finite, before anything of it is recorded."""
        if self._world.any(self._weights.could_overflow(update)):
            raise UserError(
                f"es.alpha: the update of iteration {update.iteration} could make a weight too large for its "
                "dtype, or one is not finite already. Nothing of it was recorded: the weights before it can "
                "be exported. Give another run.dir, and a smaller es.alpha or a wider model.dtype"
            )

    def _apply(self, update: Update) -> None:
        """Move the weights, and record what they became; take a snapshot of them if one is due."""
        every, iteration = self._config.log.instruments_every, update.iteration + 1
        measured = every and update.iteration % every == 0 and self._weights.moves(update)
        stats = UpdateStats(self._world.device) if measured else None
        with self._timer("update"):
            self._weights.update(update, stats=stats)
        is_due = self._snapshots.is_due(iteration)
        record: dict[str, Any] = {"type": "weights", "iteration": iteration}
        with self._timer("digest"):
            digest = self._session.digest(compare=iteration % self._config.run.check_every == 0)
            if stats is not None:
                record["instruments"] = update_stats(self._session.summed(stats.sums()))
        # On disk before the snapshot is, because it is what the snapshot will be checked against.
        self._recorder.record(record | {"digest": digest}, durable=is_due)
        if is_due:
            with self._timer("snapshot"):
                states_digest = self._session.combined(optimizer_digest(self._weights))
                self._snapshots.begin(iteration, digest=digest, states_digest=states_digest)

    def _finish(self) -> None:
        """Evaluate the final weights, and leave the model at them."""
        last = self._config.es.iterations
        self._kl.measure_if_due(last)
        self._centre.evaluate_if_due(last)
        with self._timer("snapshot"):
            self._snapshots.finish()
        self._weights.centre()
        self._reporter.finish(weights_digest=self._session.digest())


def make_training_loop(
    session: Session,
    task: Task,
    *,
    rewards: RewardRunner | None = None,
    environments: Environments | None = None,
    heldout_sets: Mapping[str, Task] | None = None,
    callbacks: Callbacks | None = None,
    encoder: PromptEncoder | None = None,
) -> TrainingLoop:
    """Put the parts of a run together; a collective of all ranks.

    Args:
        session: The model with its base weights.
        task: What it is trained on.
        rewards: Runs rewards; None: they run in this process.
        environments: Run episodes; None: they run in this process.
        heldout_sets: Further tasks by name, on whose rows the centre is evaluated, too.
        callbacks: Are told of the run as it goes on.
        encoder: Has the tokens of their prompts; None: a new one, which makes them when they are asked.

    Raises:
        UserError: The configuration does not fit the model or the data.
    """
    run, sets, mesh, timer = session.config.run, heldout_sets or {}, session.mesh, session.timer

    recorded = partial(recorded_setting, run.dir)
    judges: dict[str, Any] = {"rewards": rewards, "environments": environments}
    rollout = make_rollout(session, task, recorded=recorded, heldout_sets=sets, encoder=encoder, **judges)
    config, world, encoder = rollout.config, mesh.world, rollout.encoder
    settings = resume_fingerprint(
        config,
        data_sha256=rows_sha256(task.train if task.all_train is None else task.all_train),
        prompts_sha256=encoder.sha256_of(task) if task.episodes is None else None,
        date=encoder.told_date,
    )
    engine = rollout.evaluator.engine
    facts = {"name": config.rollout.engine, **engine.facts}
    identity = session.identity | {"is_exact": engine.is_exact, "engine": facts}
    recorder = RunRecorder(config, identity=identity, settings=settings, world=world, timer=timer)
    snapshots = SnapshotWriter(
        run.dir,
        every=run.snapshot_every,
        keep=run.keep_snapshots,
        mesh=mesh,
        weights=session.weights,
        is_sharded=session.backend.is_sharded,
    )
    reporter = Reporter(config, is_main=world.is_main, device=world.device, timer=timer, callbacks=callbacks)
    centre = CentreEvaluator(session, rollout, heldout_sets=sets, recorder=recorder, reporter=reporter)
    kl = KLEstimator(rollout, recorder=recorder, world=world)
    parts: dict[str, Any] = {"centre": centre, "kl": kl, "recorder": recorder}
    return TrainingLoop(session, rollout, snapshots=snapshots, reporter=reporter, **parts)
