"""Runs of the study: which are missing, and how one is made."""

import datetime
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from claims.arms import (
    ARMS,
    MAX_EXTENSIONS,
    ROOT,
    TASKS,
    definition,
    num_completions,
    options_on,
    seeds_on,
    step_size,
)
from claims.lines import Line
from claims.training import Trained

PACKAGES = ("torch", "transformers", "trl", "numba")


def final_reward(line: Line) -> float:
    """Return the held-out reward after all updates; minus infinity if the model is broken."""
    reward = line["curve"][-1]["reward"]
    return float("-inf") if reward is None else float(reward)


def current(lines: Iterable[Line]) -> list[Line]:
    """Return the lines that are results of arms as they are defined now."""
    return [
        line
        for line in lines
        if line["task"] in TASKS
        and line["arm"] in ARMS
        and line["task"] in ARMS[line["arm"]].tasks
        and line["definition"] == definition(line["task"], line["arm"])
    ]


def swept(lines: Iterable[Line], task: str, arm: str) -> dict[float, float]:
    """Return the final rewards of an arm's sweep on a task, by step size: means over the tuning seeds.

    Step sizes that not all of these seeds have tried yet are left out.
    """
    found: dict[float, dict[int, float]] = {}
    for line in lines:
        if (line["task"], line["arm"]) == (task, arm) and line["seed"] in TASKS[task].tuning_seeds:
            found.setdefault(line["step_size"], {})[line["seed"]] = final_reward(line)
    wanted = len(TASKS[task].tuning_seeds)
    return {size: fmean(each.values()) for size, each in found.items() if len(each) == wanted}


def next_of_sweep(found: dict[float, float], task: str, arm: str) -> tuple[list[float], float | None]:
    """Return the step sizes that a sweep still lacks, and the best one once it lacks none.

    A sweep whose best step is its first or its last is extended on that side, so the best one lies between
    two that are worse.

    Args:
        found: Rewards so far, by step size.
        task: Name of the task.
        arm: Name of the arm.
    """
    low, high = 0, TASKS[task].num_steps - 1
    while True:
        places = {step_size(task, arm, place): place for place in range(low, high + 1)}
        if lacking := [size for size in places if size not in found]:
            return lacking, None
        best = max(places, key=lambda size: found[size])
        if places[best] == low and low > -MAX_EXTENSIONS:
            low -= 1
        elif places[best] == high and high < TASKS[task].num_steps - 1 + MAX_EXTENSIONS:
            high += 1
        else:
            return [], best


def best_step(lines: Sequence[Line], task: str, arm: str) -> float | None:
    """Return the step size of an arm's reported runs; None while the sweep that decides it is not over."""
    if ARMS[arm].step is not None:
        return ARMS[arm].step
    tuned = ARMS[arm].step_of or arm
    return next_of_sweep(swept(lines, task, tuned), task, tuned)[1]


def missing(
    lines: Sequence[Line], tasks: Iterable[str], arms: Iterable[str], seeds: Sequence[int] | None = None
) -> Iterator[tuple[str, str, float, int]]:
    """Yield task, arm, step size and seed of each run that can start now and has no line yet.

    Args:
        lines: Lines so far.
        tasks: Names of tasks.
        arms: Names of arms.
        seeds: Seeds that are reported; None: those of each task and arm.
    """
    done = {(line["task"], line["arm"], line["step_size"], line["seed"]) for line in lines}
    arms = list(arms)
    for task in tasks:
        for arm in (arm for arm in arms if task in ARMS[arm].tasks):
            best = best_step(lines, task, arm)
            if best is not None:
                wanted = [(task, arm, best, seed) for seed in seeds or seeds_on(task, arm)]
            elif ARMS[arm].step_of is None:
                lacking, _ = next_of_sweep(swept(lines, task, arm), task, arm)
                wanted = [(task, arm, size, seed) for size in lacking for seed in TASKS[task].tuning_seeds]
            else:
                continue
            yield from (each for each in wanted if each not in done)


def run_one(task: str, arm: str, step: float, seed: int) -> Line:
    """Train and measure once; return the line of the run."""
    from claims.measuring import measure

    asked, tried = TASKS[task], ARMS[arm]
    keys: dict[str, Any] = {**asked.overrides, "es.seed": seed}
    with tempfile.TemporaryDirectory() as directory:
        keys["run.dir"] = directory
        if tried.method == "es":
            keys |= {**options_on(task, arm), "es.alpha": step}
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        # Of a sweep the last reward alone is used.
        is_sweep = seed in asked.tuning_seeds
        num_evaluations, kl_prompts = (1, 0) if is_sweep else (asked.num_evaluations, asked.kl_prompts)
        config, trained = _train(
            task, arm, overrides, step=step, out=Path(directory), num_evaluations=num_evaluations
        )
        curve = measure(config, trained, kl_prompts=kl_prompts)
    return {
        "task": task,
        "arm": arm,
        "step_size": step,
        "seed": seed,
        "definition": definition(task, arm),
        "curve": curve,
        "peak_bytes": trained.peak_bytes,
        "imported_bytes": trained.imported_bytes,
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
    }


def _train(
    task: str, arm: str, overrides: Sequence[str], *, step: float, out: Path, num_evaluations: int
) -> tuple[Any, Trained]:
    asked, tried = TASKS[task], ARMS[arm]
    path = ROOT / asked.config
    if tried.method == "es":
        from claims.es import es_config, train_es

        config = es_config(
            path,
            overrides,
            num_completions=num_completions(task, arm),
            answers=tried.answers.get(task, 1.0),
        )
        return config, train_es(config, num_evaluations=num_evaluations)
    from claims.grpo import train_grpo
    from claims.measuring import one_process
    from claims.settings import GRPOSettings

    config = one_process(path, overrides)
    settings = GRPOSettings(learning_rate=step, **options_on(task, arm))
    trained = train_grpo(
        config,
        settings,
        out=out,
        num_completions=num_completions(task, arm),
        num_evaluations=num_evaluations,
    )
    return config, trained


def _versions() -> dict[str, str]:
    from shardes.utils.version import VERSION

    found = {"python": platform.python_version(), "shardes": VERSION}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
