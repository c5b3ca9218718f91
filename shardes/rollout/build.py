"""Putting together what evaluates members: the engine, the evaluator over it, and the scheduler."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.environments.runners import Environments, tasks_by_key
from shardes.es.objective import Objective, make_objective
from shardes.es.shaping import RewardTable
from shardes.es.strategy import Strategy
from shardes.models.build import end_tokens, max_positions, pad_token
from shardes.rewards.pool import InProcessRewards, RewardRunner
from shardes.rewards.scorer import Scorer
from shardes.rollout.autotune import resolve_auto
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Engine
from shardes.rollout.engines.registry import ENGINES
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.gather_modes import BATCHED_GATHERS
from shardes.rollout.iteration import IterationSpec
from shardes.rollout.preparing import make_encoder
from shardes.rollout.racing import Race, check_portions
from shardes.rollout.scheduler import MemberScheduler
from shardes.session import Session
from shardes.tasks.base import Row, Task, all_rewards
from shardes.tasks.sampler import draw_batch
from shardes.tasks.screening import Screening, make_screening
from shardes.utils.references import load_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """What evaluates members and the centre of a run.

    Attributes:
        config: The run's configuration, with numbers for ``auto``.
        evaluator: Generates and scores.
        scheduler: Has members evaluated over the ranks.
        strategy: Says which member has which perturbation.
        task: What is trained on.
        scorer: Has answers to its problems scored.
        set_scorers: The same of further tasks, by name.
        encoder: Makes tokens of prompts.
        objective: What a member earns by the answers to a problem.
        screening: Chooses the problems to ask of those that are drawn; None: all are asked.
    """

    config: Config
    evaluator: Evaluator
    scheduler: MemberScheduler
    strategy: Strategy
    task: Task
    scorer: Scorer
    set_scorers: Mapping[str, Scorer]
    encoder: PromptEncoder
    objective: Objective
    screening: Screening | None = None

    def spec(self, iteration: int, *, num_problems: int | None = None) -> IterationSpec:
        """Return what an iteration asks of its members; of its first problems, if a number is given."""
        drawn = _draw(self.config, self.task, iteration)[:num_problems]
        asked = None if self.screening is None else self.screening.choose(drawn, iteration=iteration)
        rows = [self.task.train[index] for index in (drawn if asked is None else asked.rows)]
        return IterationSpec(iteration, rows, self.evaluator, self.strategy, self.objective, asked)

    def race(self, spec: IterationSpec) -> Race | None:
        """Return the race of an iteration's members; None if all of them answer everything."""
        es = self.config.es
        if es.racing is None:
            return None
        on_error = self.config.task.on_reward_error
        return Race(spec, es.racing, antithetic=es.antithetic, on_error=on_error)

    def learn(self, spec: IterationSpec, table: RewardTable) -> dict[str, Any]:
        """Learn from rewards which problems to ask next; return what the journal needs to know of it.

        Args:
            spec: What the iteration asked.
            table: Rewards of each member for its problems.
        """
        if self.screening is None or spec.asked is None:
            return {}
        return {"screening": self.screening.learn(spec.asked, table)}

    def resume(self, updates: Sequence[Mapping[str, Any]]) -> None:
        """Know what ``learn`` had found out before, by the journal's records of updates."""
        if self.screening is not None:
            self.screening.resume(updates)

    def measured(self) -> dict[str, Any]:
        """Return what was measured on this rank since the last call, by the names of metrics.jsonl."""
        found: dict[str, Any] = {"gather": self.evaluator.engine.gather}
        return found if self.task.episodes is None else found | self.evaluator.take_episode_counts()

    def begin(self) -> None:
        """Choose how weights are gathered by what the first iteration asks; a collective of all ranks."""
        self.evaluator.begin(self.evaluator.prepare(_first_rows(self.config, self.task), iteration=0))


def make_evaluator(
    session: Session,
    task: Task,
    *,
    rewards: RewardRunner | None = None,
    environments: Environments | None = None,
    others: Mapping[str, Task] | None = None,
    encoder: PromptEncoder | None = None,
) -> tuple[Evaluator, Scorer, dict[str, Scorer]]:
    """Build what answers and scores a task's problems with a session's model.

    Args:
        session: The model.
        task: What it is trained on.
        rewards: Runs rewards; None: they run in this process.
        environments: Run episodes; None: they run in this process.
        others: Further tasks by name.
        encoder: Has the tokens of their prompts; None: a new one, which makes them when they are asked.

    Returns:
        The evaluator, the task's scorer, and those of the others.
    """
    config, others = session.config, others or {}
    if rewards is None:
        rewards = InProcessRewards(all_rewards([task, *others.values()]))
    if environments is None:
        in_process = config.task.model_copy(update={"reward_workers": 0})
        environments = Environments(
            config.model_copy(update={"task": in_process}), tasks_by_key(task, others)
        )
    judges: dict[str, Any] = {"rewards": rewards, "on_error": config.task.on_reward_error}
    scorer = Scorer(task, environments=environments.of(task), **judges)
    scorers = {
        name: Scorer(other, environments=environments.of(other), **judges) for name, other in others.items()
    }
    settings, spec = config.rollout, BACKENDS[config.parallel.backend]
    only = spec.auto_gather
    if settings.gather == "auto" and only in (BATCHED_GATHERS if settings.is_batched else spec.gathers):
        logger.info("rollout.gather: auto is %s: %s", only, spec.auto_reason)
        settings = settings.model_copy(update={"gather": only})
    encoder = encoder or make_encoder(config)
    encoder.settle_date(session.mesh.world)
    tokenizer, model = encoder.tokenizer, session.backend.sharded_model
    common: dict[str, Any] = {"tokenizer": tokenizer, "mesh": session.mesh, "settings": settings}
    common |= {"seed": config.es.seed, "timer": session.timer}
    engine: Engine = load_class(ENGINES[settings.engine])(
        backend=session.backend, weights=session.weights, **common
    )
    common |= {"encoder": encoder, "max_positions": max_positions(model)}
    common |= {"pad_id": pad_token(model, tokenizer), "end_ids": end_tokens(model, tokenizer)}
    return Evaluator(engine, scorer=scorer, environments=environments, **common), scorer, scorers


def make_scheduler(session: Session, evaluator: Evaluator) -> MemberScheduler:
    """Build what has members evaluated over a session's ranks."""
    return MemberScheduler(
        evaluator,
        mesh=session.mesh,
        timeout_seconds=session.config.parallel.timeout_seconds,
        stop=session.stop,
        timer=session.timer,
    )


def make_rollout(
    session: Session,
    task: Task,
    *,
    recorded: Callable[[str], Any],
    rewards: RewardRunner | None = None,
    environments: Environments | None = None,
    heldout_sets: Mapping[str, Task] | None = None,
    encoder: PromptEncoder | None = None,
) -> Rollout:
    """Build what evaluates the members of a run, and find what ``auto`` is; a collective of all ranks.

    Args:
        session: The model with its base weights.
        task: What it is trained on.
        recorded: Returns the setting of a dotted key with which the run began; None if it is new.
        rewards: Runs rewards; None: they run in this process.
        environments: Run episodes; None: they run in this process.
        heldout_sets: Further tasks by name.
        encoder: Has the tokens of their prompts; None: a new one, which makes them when they are asked.

    Raises:
        UserError: Members that share forwards would compute other logits than by themselves, or there are
            fewer micro-batches than rounds of racing.
    """
    config = session.config
    encoder = encoder or make_encoder(config, date=recorded("task.date"))
    evaluator, scorer, set_scorers = make_evaluator(
        session, task, rewards=rewards, environments=environments, others=heldout_sets, encoder=encoder
    )
    num_elements = sum(shard.num_elements for shard in session.weights.trained)
    strategy = Strategy(config.es, num_elements=num_elements)
    config = resolve_auto(
        config,
        evaluator,
        recorded=recorded,
        rows=task.train,
        first_rows=_first_rows(config, task),
        population=strategy.num_members(0),
        mesh=session.mesh,
    )
    if config.es.racing is not None:
        first = evaluator.prepare(_first_rows(config, task), iteration=0)
        check_portions(first, config.es.racing, micro_batch_size=evaluator.micro_batch_size)
    scheduler = make_scheduler(session, evaluator)
    samples = config.rollout.samples_per_prompt
    objective = make_objective(config.task.objective, samples_per_prompt=samples)
    screening = make_screening(config.task.screening, task, seed=config.es.seed)
    rollout = Rollout(
        config, evaluator, scheduler, strategy, task, scorer, set_scorers, encoder, objective, screening
    )
    if config.rollout.is_batched:
        rollout.begin()
        evaluator.engine.check(sigma=config.es.sigma)
    return rollout


def _first_rows(config: Config, task: Task) -> list[Row]:
    """Return the problems of the first iteration."""
    return [task.train[index] for index in _draw(config, task, 0)]


def _draw(config: Config, task: Task, iteration: int) -> list[int]:
    """Return the indices of an iteration's problems."""
    return draw_batch(
        len(task.train),
        batch_size=config.task.batch_size,
        sampling=config.task.sampling,
        seed=config.es.seed,
        iteration=iteration,
    )
