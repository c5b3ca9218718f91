"""Evaluate a model for ``shardes evaluate``: all answers, and means with confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardes.environments.runners import Environments
from shardes.es.member import apply_reward_error_policy
from shardes.es.objective import MEAN, Objective, make_objective
from shardes.evaluation.coverage import passes_of
from shardes.rewards.pool import RewardRunner
from shardes.rollout.aggregate import Evaluation
from shardes.rollout.autotune import find_micro_batch_size
from shardes.rollout.build import make_evaluator, make_scheduler
from shardes.rollout.encoding import PromptEncoder
from shardes.session import Session
from shardes.tasks.base import Task

NUM_RESAMPLES = 1000
"""Bootstrap resamples behind a confidence interval."""


@dataclass(frozen=True)
class Estimate:
    """Mean with its 95% confidence interval over problems of the same kind.

    Attributes:
        mean: Mean over answers; None if there are no values.
        low: 2.5th percentile of the means over resampled problems.
        high: 97.5th percentile of these means.
    """

    mean: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float | None], *, samples_per_problem: int) -> Estimate:
    """Return the mean of the values that are not None, and its 95% confidence interval.

    The interval is a percentile bootstrap over problems, not over answers: answers to one problem are alike.
    Its random numbers have a fixed seed, so equal values give equal intervals.

    Args:
        values: Value of each answer, those to one problem side by side; None: the answer is left out.
        samples_per_problem: Number of answers to each problem.
    """
    known = np.array([value is not None for value in values]).reshape(-1, samples_per_problem)
    numbers = np.array([value or 0.0 for value in values]).reshape(-1, samples_per_problem)
    counts, sums = known.sum(axis=1)[known.any(axis=1)], numbers.sum(axis=1)[known.any(axis=1)]
    if not len(counts):
        return Estimate(None, None, None)
    return ratio_estimate(sums, counts)


def ratio_estimate(sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Estimate:
    """Return the ratio of two totals over problems, with the interval of ``estimate``.

    Args:
        sums: Part of each problem in the upper total; at least one.
        counts: Its part in the lower total; above 0.
    """
    sums, counts = np.asarray(sums), np.asarray(counts)
    random = np.random.Generator(np.random.Philox(key=0))
    ratios = []
    for _ in range(NUM_RESAMPLES):
        drawn = random.integers(len(counts), size=len(counts))
        ratios.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def summarise(
    evaluation: Evaluation,
    *,
    samples_per_problem: int,
    pass_reward: float | None,
    on_error: str | float,
    objective: Objective = MEAN,
) -> dict[str, Any]:
    """Return the statistics of one evaluation by name, JSON-able.

    Args:
        evaluation: Answers of the model with their rewards.
        samples_per_problem: Number of answers to each problem.
        pass_reward: Least reward of an answer that passes; None: pass rates are left out.
        on_error: Value of ``task.on_reward_error``.
        objective: What the answers to a problem earn together; it is reported unless it is the mean.
    """
    count = samples_per_problem
    rewards = apply_reward_error_policy(evaluation.rewards, evaluation.has_failed, on_error=on_error)
    summary: dict[str, Any] = {
        "num_problems": len(rewards) // count,
        "samples_per_prompt": count,
        f"mean@{count}": vars(estimate(rewards, samples_per_problem=count)),
    }
    if not objective.is_mean:
        by_problem = objective.of_problems(rewards, samples_per_prompt=count)
        summary["objective"] = vars(estimate(by_problem, samples_per_problem=1))
    if pass_reward is not None:
        passes = passes_of(rewards, evaluation.has_failed, pass_reward=pass_reward)
        summary["pass@1"] = vars(estimate(passes, samples_per_problem=count))
        if count > 1:
            groups = [passes[low : low + count] for low in range(0, len(passes), count)]
            known = [[value for value in group if value is not None] for group in groups]
            any_pass = [max(group) if group else None for group in known]
            summary[f"pass@{count}"] = vars(estimate(any_pass, samples_per_problem=1))
    summary["components"] = {
        name: vars(estimate(values, samples_per_problem=count))
        for name, values in evaluation.components.items()
    }
    return summary | {
        "num_failures": evaluation.num_failures,
        "num_excluded": sum(reward is None for reward in rewards),
        "num_tokens": evaluation.num_tokens,
    }


def evaluate_model(
    session: Session,
    task: Task,
    *,
    rewards: RewardRunner | None,
    environments: Environments | None = None,
    heldout_sets: Mapping[str, Task],
    encoder: PromptEncoder | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the centre on held-out problems, or on all if none are; a collective of all ranks.

    Args:
        session: Session whose model is at the weights to evaluate.
        task: Task whose held-out rows are answered, or its other rows if it has none.
        rewards: Runner of the rewards; None: rewards run in this process.
        environments: Run episodes; None: they run in this process.
        heldout_sets: Further tasks by name, whose rows are answered as well.
        encoder: Has the tokens of their prompts; None: a new one, which makes them when they are asked.

    Returns:
        Statistics by name of the set, and a line for each answer on rank 0; no lines on other ranks.
    """
    config = session.config
    evaluator, scorer, scorers = make_evaluator(
        session, task, rewards=rewards, environments=environments, others=heldout_sets, encoder=encoder
    )
    if config.rollout.micro_batch_size == "auto":
        rows = task.heldout or task.train
        find_micro_batch_size(evaluator, rows, num_rows=len(rows), mesh=session.mesh, sigma=config.es.sigma)
    scheduler = make_scheduler(session, evaluator)
    sets = {"heldout" if task.heldout else "data": (task.heldout or task.train, scorer)}
    sets |= {name: (other.train, scorers[name]) for name, other in heldout_sets.items()}
    summaries: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    for name, (rows, judge) in sets.items():
        prompts = evaluator.prepare(rows, iteration=0, scorer=judge)
        found = scheduler.evaluate_centre(prompts, keeps_samples=True)
        count, has_answers = prompts.samples_per_prompt, judge.task.choices is None
        summaries[name] = summarise(
            found,
            samples_per_problem=count,
            pass_reward=config.eval.pass_reward if has_answers else None,
            on_error=config.task.on_reward_error,
            objective=make_objective(config.task.objective, samples_per_prompt=count)
            if has_answers
            else MEAN,
        )
        parts = session.mesh.world.gather_json({k: vars(v) for k, v in found.samples.items()})
        samples = {int(k): v for part in parts for k, v in part.items()}
        for index, sample in sorted(samples.items()):
            place = {"set": name, "row": index // count, "sample": index % count}
            components = {key: values[index] for key, values in found.components.items()}
            lines.append(place | sample | {"components": components})
    return summaries, lines if session.mesh.world.is_main else []
