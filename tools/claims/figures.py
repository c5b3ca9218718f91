"""Numbers that the page shows, computed from lines."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from claims.arms import ARMS, TASKS
from claims.lines import Line
from claims.means import Mean, mean_of
from claims.runs import best_step, final_reward, swept

# Share of the largest gain that counts as reaching it.
REACHED = 0.9


class Results:
    """Lines of the study, by task and arm.

    Args:
        lines: Lines that are results of arms as they are defined now.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)

    def tasks(self) -> list[str]:
        """Return the names of the tasks that have lines, in the study's order."""
        found = {line["task"] for line in self.lines}
        return [task for task in TASKS if task in found]

    def arms(self, task: str, *, evidence: Iterable[str] | None = None) -> list[str]:
        """Return the names of a task's arms whose sweep is over and that have a run, in the study's order."""
        kinds = None if evidence is None else set(evidence)
        return [
            arm
            for arm, defined in ARMS.items()
            if task in defined.tasks and (kinds is None or defined.evidence in kinds) and self.runs(task, arm)
        ]

    def sweep(self, task: str, arm: str) -> dict[float, float]:
        """Return the final reward by step size, as the mean of the tuning seeds."""
        return dict(sorted(swept(self.lines, task, arm).items()))

    def best(self, task: str, arm: str) -> float | None:
        """Return the step size of an arm's reported runs; None while it is not known."""
        return best_step(self.lines, task, arm)

    def runs(self, task: str, arm: str) -> dict[int, Line]:
        """Return the lines of the best step size by seed, without those of the tuning seeds."""
        best = self.best(task, arm)
        found = {
            line["seed"]: line
            for line in self.lines
            if (line["task"], line["arm"], line["step_size"]) == (task, arm, best)
        }
        return {seed: found[seed] for seed in sorted(found) if seed not in TASKS[task].tuning_seeds}

    def on_shared_seeds(self, task: str, arms: Sequence[str]) -> "Results":
        """Return results in which some arms of a task have only runs of the seeds that all of them have."""
        seeds = set.intersection(*(set(self.runs(task, arm)) for arm in arms))
        seeds.update(TASKS[task].tuning_seeds)
        return Results(
            line
            for line in self.lines
            if line["task"] != task or line["arm"] not in arms or line["seed"] in seeds
        )

    def base_reward(self, task: str) -> float:
        """Return the held-out reward of the base model."""
        line = next(line for line in self.lines if line["task"] == task)
        return float(line["curve"][0]["reward"])

    def final(self, task: str, arm: str) -> dict[int, float]:
        """Return the final held-out rewards by seed."""
        return {seed: final_reward(line) for seed, line in self.runs(task, arm).items()}

    def last(self, task: str, arm: str, key: str) -> list[float]:
        """Return a field of the last points of the runs, where it is known."""
        points = [line["curve"][-1] for line in self.runs(task, arm).values()]
        return [point[key] for point in points if point.get(key) is not None]

    def difference(self, task: str, arm: str, other: str) -> Mean | None:
        """Return how much more reward an arm has than another, on the seeds that both have."""
        one, two = self.final(task, arm), self.final(task, other)
        shared = [one[seed] - two[seed] for seed in one if seed in two]
        return mean_of(shared) if shared else None

    def difference_at_half(self, task: str, arm: str, other: str) -> Mean | None:
        """Return how much more reward an arm has after half of another's tokens than the other at its end.

        Runs are compared on the seeds that both have, each with its own number of tokens.
        """
        runs = self.runs(task, arm)
        shared = [
            interpolated(runs[seed]["curve"], key="num_tokens", value=line["curve"][-1]["num_tokens"] / 2)
            - final_reward(line)
            for seed, line in self.runs(task, other).items()
            if seed in runs
        ]
        return mean_of(shared) if shared else None

    def reward_at(self, task: str, arm: str, *, key: str, value: float) -> list[float]:
        """Return the rewards of the runs where they had spent a given amount, between points by lines.

        Args:
            task: Name of the task.
            arm: Name of the arm.
            key: What is spent: ``num_completions``, ``num_tokens`` or ``core_seconds``.
            value: How much of it.
        """
        return [interpolated(line["curve"], key=key, value=value) for line in self.runs(task, arm).values()]

    def smallest_total(self, task: str, arms: Sequence[str], *, key: str) -> float:
        """Return the least that one of some arms has spent in all, as the mean of its runs."""
        return min(statistics.fmean(self.last(task, arm, key)) for arm in arms)

    def until(self, task: str, arm: str, *, reward: float, key: str) -> list[float | None]:
        """Return what each run had spent at its first point with a reward; None: it never had it."""
        return [
            next((point[key] for point in line["curve"] if (point["reward"] or -math.inf) >= reward), None)
            for line in self.runs(task, arm).values()
        ]

    def target(self, task: str, arms: Sequence[str]) -> float:
        """Return the reward at 90% of the gain of the arm that gains most."""
        base = self.base_reward(task)
        best = max(statistics.fmean(self.final(task, arm).values()) for arm in arms)
        return base + REACHED * (best - base)

    def good_steps(self, task: str, arm: str) -> tuple[int, int]:
        """Return how many step sizes reach 90% of the sweep's best gain, and how many were tried."""
        base, found = self.base_reward(task), self.sweep(task, arm)
        least = base + REACHED * (max(found.values()) - base)
        return sum(reward >= least for reward in found.values()), len(found)


def interpolated(curve: Sequence[dict[str, Any]], *, key: str, value: float) -> float:
    """Return the reward of a curve at an amount spent; beyond its end, its last reward."""
    known = [point for point in curve if point["reward"] is not None]
    for before, after in itertools.pairwise(known):
        if before[key] <= value <= after[key] and after[key] > before[key]:
            share = (value - before[key]) / (after[key] - before[key])
            return float(before["reward"] + share * (after["reward"] - before["reward"]))
    return float(known[-1]["reward"])
