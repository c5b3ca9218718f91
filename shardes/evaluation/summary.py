"""Evaluation of a model for ``shardes evaluate``: every answer, and means with confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardes.es.member import apply_reward_error_policy
from shardes.rewards.pool import RewardRunner
from shardes.rollout.aggregate import Evaluation, Sample
from shardes.rollout.autotune import find_micro_batch_size
from shardes.rollout.build import make_evaluator, make_scheduler
from shardes.session import Session
from shardes.tasks.base import Task

NUM_RESAMPLES = 1000
"""Bootstrap resamples behind a confidence interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean, with the 95% confidence interval over problems of the same kind.

    Attributes:
        mean: The mean over answers; None if no answer counts.
        low: The 2.5th percentile of the means of resampled problems.
        high: The 97.5th percentile.
    """

    mean: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float | None], *, samples_per_problem: int) -> Estimate:
    """Return the mean of the values that are not None, and its 95% confidence interval.

    The interval is a percentile bootstrap over problems, not over answers: answers to one problem are alike.
    Its random numbers have a fixed seed, so equal values give equal intervals.

    Args:
        values: One per answer, those to one problem side by side; None where there is none.
        samples_per_problem: Answers to each problem.
    """
    known = np.array([value is not None for value in values]).reshape(-1, samples_per_problem)
    numbers = np.array([value or 0.0 for value in values]).reshape(-1, samples_per_problem)
    counts, sums = known.sum(axis=1)[known.any(axis=1)], numbers.sum(axis=1)[known.any(axis=1)]
    if not len(counts):
        return Estimate(None, None, None)
    random = np.random.Generator(np.random.Philox(key=0))
    means = []
    for _ in range(NUM_RESAMPLES):
        drawn = random.integers(len(counts), size=len(counts))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))


def summarise(
    evaluation: Evaluation, *, samples_per_problem: int, pass_reward: float | None, on_error: str | float
) -> dict[str, Any]:
    """Return the numbers of one evaluation, JSON-able and by name.

    Args:
        evaluation: The model's answers and their rewards.
        samples_per_problem: Answers to each problem.
        pass_reward: An answer with at least this reward passes; None: nothing is said about passing.
        on_error: ``task.on_reward_error``.
    """
    count = samples_per_problem
    rewards = apply_reward_error_policy(evaluation.rewards, evaluation.has_failed, on_error=on_error)
    summary: dict[str, Any] = {
        "num_problems": len(rewards) // count,
        "samples_per_prompt": count,
        f"mean@{count}": vars(estimate(rewards, samples_per_problem=count)),
    }
    if pass_reward is not None:
        # A failed reward is no pass; an answer that no reward applies to is left out.
        passes = [
            None
            if reward is None and not failed
            else float(reward is not None and reward >= pass_reward and not failed)
            for reward, failed in zip(rewards, evaluation.has_failed, strict=True)
        ]
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
    session: Session, task: Task, *, rewards: RewardRunner | None, heldout_sets: Mapping[str, Task]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate the centre on held-out problems, or on all if none are; a collective of all ranks.

    Args:
        session: The model, at the weights to evaluate.
        task: The task whose held-out rows are answered; if it has none, its other rows.
        rewards: Runner of rewards; None: in this process.
        heldout_sets: Further tasks by name, whose rows are answered as well.

    Returns:
        A summary by set, and a line for each answer; the lines are on rank 0 only.
    """
    config = session.config
    evaluator, scorer, scorers = make_evaluator(session, task, rewards=rewards, others=heldout_sets)
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
        count = prompts.samples_per_prompt
        summaries[name] = summarise(
            found,
            samples_per_problem=count,
            pass_reward=config.eval.pass_reward if judge.task.choices is None else None,
            on_error=config.task.on_reward_error,
        )
        parts = session.mesh.world.gather_json({k: vars(v) for k, v in found.samples.items()})
        samples = {int(k): Sample(**v) for part in parts for k, v in part.items()}
        for index, sample in sorted(samples.items()):
            place = {"set": name, "row": index // count, "sample": index % count}
            components = {key: values[index] for key, values in found.components.items()}
            lines.append(place | vars(sample) | {"components": components})
    return summaries, lines if session.mesh.world.is_main else []
