"""Run the study behind benchmarks/es.md: arms of the algorithm on two small tasks, at equal evaluations.

An arm is the base arm with something changed. Its step size is the best of three, tried on one seed; then it
runs on five other seeds. Every run is a line of a file, so the study goes on where it was stopped.

    python tools/study.py run --jobs 2 --out benchmarks/es.jsonl
    python tools/study.py table benchmarks/es.jsonl
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import click
from claims.lines import make_missing, read_lines
from claims.means import mean_of

ROOT = Path(__file__).parent.parent
TUNING_SEED, SEEDS = 100, (1, 2, 3, 4, 5)
# Of an arm's natural step, by task: three that have the best of most arms among them.
FACTORS = {"quickstart": (1.0, 2.0, 4.0), "long quickstart": (1.0, 2.0), "addition": (0.5, 1.0, 2.0)}

TASKS: dict[str, dict[str, Any]] = {
    "quickstart": {"es.iterations": 40},
    "long quickstart": {"es.iterations": 100},
    "addition": {
        "es.iterations": 12,
        "model.path": ROOT / "configs" / "addition" / "model",
        "task.name": None,
        "task.data": ROOT / "configs" / "addition" / "train.jsonl",
        "task.heldout_data": ROOT / "configs" / "addition" / "heldout.jsonl",
        "task.reward": f"{ROOT / 'configs' / 'addition' / 'reward.py'}:digits",
        "rollout.max_new_tokens": 4,
    },
}


@dataclass(frozen=True)
class Arm:
    """Variant of the algorithm that is compared with others.

    Attributes:
        group: Name of the group of arms that are compared with each other.
        changes: Keys that differ from those of the base arm, besides alpha.
        alpha: Step size that factors multiply; it gives about as long a step as that of the base arm.
        reference: Name of the other implementation that replaces a part of shardes; None: none does.
        tasks: Names of the tasks on which it runs.
    """

    group: str
    changes: dict[str, Any] = field(default_factory=dict)
    alpha: float = 0.005
    reference: str | None = None
    tasks: tuple[str, ...] = ("quickstart", "addition")


LONG = ("quickstart", "long quickstart", "addition")
# As many iterations as take the time of the base arm's 40, in one process, members sharing forwards.
ITERATIONS_AT_EQUAL_TIME = {1: 47, 4: 31, 8: 26}

# With linear decay throughout, which the quickstart has and the paper does not: "constant" is the paper's.
ARMS = {
    "base": Arm("all", tasks=LONG),
    "constant": Arm("schedule", {"es.alpha_schedule": "constant"}, tasks=LONG),
    "cosine": Arm("schedule", {"es.alpha_schedule": "cosine"}, tasks=LONG),
    "sigma falls": Arm(
        "schedule", {"es.sigma": 0.014, "es.sigma_schedule": "linear", "es.final_sigma": 0.006}
    ),
    "adaptive sigma": Arm("schedule", reference="adaptive sigma"),
    "antithetic": Arm("directions", {"es.antithetic": True}),
    "rademacher": Arm("directions", {"es.noise": "rademacher"}),
    "noise reuse 2": Arm("directions", {"es.noise_reuse": 2}),
    "own prompts": Arm(
        "directions",
        {"task.batch_size": 128, "es.prompts_per_member": 64, "es.shaping": "per_prompt"},
        alpha=0.04,
    ),
    "centered ranks": Arm("shaping", {"es.shaping": "centered_rank"}, alpha=0.0175),
    "rewards as they are": Arm("shaping", {"es.shaping": "none"}, alpha=0.08),
    "per prompt": Arm("shaping", {"es.shaping": "per_prompt"}, alpha=0.04),
    "momentum": Arm("optimizer", {"es.optimizer": "momentum"}, alpha=0.0005),
    "adam": Arm("optimizer", {"es.optimizer": "adam"}, alpha=0.0009),
    "adam, anchored": Arm(
        "optimizer",
        {"es.optimizer": "adam", "es.weight_decay": 10.0, "es.decay_towards": "base"},
        alpha=0.0009,
    ),
    "bf16, float32 master": Arm("precision", {"model.dtype": "bfloat16"}),
    "bf16, stochastic rounding": Arm("precision", {"model.dtype": "bfloat16", "weights.master": "model"}),
    "bf16, perturb and subtract": Arm(
        "precision", {"model.dtype": "bfloat16", "weights.master": "model"}, reference="perturb and subtract"
    ),
    **{f"rank {rank}": Arm("rank", {"es.noise": "low_rank", "es.rank": rank}) for rank in (1, 2, 4, 8)},
    **{
        f"rank {rank}, equal time": Arm(
            "rank",
            {
                "es.noise": "low_rank",
                "es.rank": rank,
                "es.iterations": iterations,
                "rollout.members_per_forward": 32 if rank == 1 else 16,
            },
            tasks=("quickstart",),
        )
        for rank, iterations in ITERATIONS_AT_EQUAL_TIME.items()
    },
}


def perturb_and_subtract() -> Any:
    """Add noise to the bfloat16 weights and subtract it again, as other implementations do."""
    import torch

    from shardes import noise
    from shardes.es.update import Perturbation, Update
    from shardes.weights.master import Weights

    class Subtracting(Weights):
        added: tuple[int, int, float] | None = None

        def _add(self, iteration: int, direction: int, sigma: float) -> None:
            for _, region, working, _ in self.on_device():
                noise.perturb(
                    working,
                    working,
                    region=region,
                    sigma=sigma,
                    seed=self.seed,
                    iteration=iteration,
                    direction=direction,
                    kind=self.kind,
                )
            self.backend.commit()

        def _restore(self) -> None:
            if self.added is not None:
                iteration, direction, sigma = self.added
                self._add(iteration, direction, -sigma)
            self.added = None

        def perturb(self, perturbation: Perturbation) -> None:
            self._restore()
            self.added = (perturbation.iteration, perturbation.direction, perturbation.sigma)
            self._add(*self.added)

        def centre(self) -> None:
            if self.base is not None and self.last_update is None and self.added is None:
                super().centre()  # the model has just been read
            self._restore()

        @torch.no_grad()
        def update(self, update: Update, **stats: Any) -> None:
            self._restore()
            for _, region, working, master in self.on_device():
                working.copy_((working.float() + self.gradient(region, update)).to(working.dtype))
                master.copy_(working)
            self.last_update = update

    return mock.patch("shardes.session.Weights", Subtracting)


def adaptive_sigma() -> Any:
    """Let sigma grow while members cannot be told apart, and shrink while they can."""
    from shardes.es.reward_stats import reward_stats
    from shardes.es.strategy import Strategy, reward_table

    class Adaptive(Strategy):
        scale = 1.0

        def sigma(self, iteration: int) -> float:
            return self._settings.sigma * self.scale

        def alpha(self, iteration: int) -> float:
            return super().alpha(iteration) * self.scale

        def shaped(self, rewards: Any, results: Any, **rest: Any) -> list[float]:
            shaped = super().shaped(rewards, results, **rest)
            found = reward_stats(reward_table(results), rewards=rewards, shaped=shaped)["reward_snr"]
            self.next_scale = self.scale * (1.05 if found is None or found < 1.5 else 1 / 1.05)
            return shaped

        def update(self, shaped: Any, **place: Any) -> Any:
            update = super().update(shaped, **place)
            self.scale = min(max(self.next_scale, 0.25), 4.0)
            return update

    return mock.patch("shardes.rollout.build.Strategy", Adaptive)


def run_one(task: str, name: str, factor: float, seed: int) -> dict[str, Any]:
    """Train once; return the line of the run."""
    from shardes.config.loading import load_config
    from shardes.session import open_session
    from shardes.tasks.loading import load_task
    from shardes.trainer import make_training_loop

    arm = ARMS[name]
    references = {
        None: contextlib.nullcontext,
        "adaptive sigma": adaptive_sigma,
        "perturb and subtract": perturb_and_subtract,
    }
    keys: dict[str, Any] = {
        "parallel.backend": "single",
        "task.reward_workers": 0,
        "log.samples_every": 0,
        "log.instruments_every": 0,
        "es.seed": seed,
        "es.alpha": arm.alpha * factor,
        **TASKS[task],
        **arm.changes,
    }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, references[arm.reference]():
        keys["run.dir"] = directory
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]
        config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
        config = config.model_copy(
            update={"eval": config.eval.model_copy(update={"every": config.es.iterations})}
        )
        with open_session(config) as session:
            trainer = make_training_loop(session, load_task(config.task))
            trainer.train()
        lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return {
        "task": task,
        "arm": name,
        "factor": factor,
        "seed": seed,
        "changes": changes_of(task, arm),
        "heldout_reward": lines[-1]["heldout_reward"],
        "base_reward": lines[0]["heldout_reward"],
        "seconds": time.monotonic() - start,
    }


def changes_of(task: str, arm: Arm) -> dict[str, Any]:
    """Return the settings of an arm on a task, which a line must have to be a result of the arm."""
    changes = {**TASKS[task], **arm.changes, "alpha": arm.alpha, "reference": arm.reference}
    return {key: value for key, value in changes.items() if not str(value).startswith(str(ROOT))}


def best_factors(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the best factor of the step size for each task and arm whose factors were all tried."""
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for line in lines:
        if line["seed"] == TUNING_SEED and line["factor"] in FACTORS[line["task"]]:
            tried.setdefault((line["task"], line["arm"]), {})[line["factor"]] = line["heldout_reward"]
    return {
        key: max(found, key=lambda factor: found[factor])
        for key, found in tried.items()
        if set(found) == set(FACTORS[key[0]])
    }


def missing(
    lines: list[dict[str, Any]], tasks: list[str], arms: list[str]
) -> Iterator[tuple[str, str, float, int]]:
    """Yield task, arm, factor and seed of each run that can start now and has no line yet."""
    done = {(line["task"], line["arm"], line["factor"], line["seed"]) for line in lines}
    best = best_factors(lines)
    for task in tasks:
        for arm in (arm for arm in arms if task in ARMS[arm].tasks):
            wanted = [(task, arm, factor, TUNING_SEED) for factor in FACTORS[task]]
            if (task, arm) in best:
                wanted = [(task, arm, best[task, arm], seed) for seed in SEEDS]
            yield from (each for each in wanted if each not in done)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that are results of arms as they are defined now."""
    return [
        line
        for line in read_lines(path)
        if line["arm"] in ARMS and line["changes"] == changes_of(line["task"], ARMS[line["arm"]])
    ]


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A line of it is one run.")
@click.option("--jobs", default=1, help="Runs at a time, one thread each.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="Only these tasks.")
@click.option("--arm", "arms", multiple=True, type=click.Choice(list(ARMS)), help="Only these arms.")
def run(out: Path, jobs: int, tasks: tuple[str, ...], arms: tuple[str, ...]) -> None:
    """Run everything that has no line in the file yet."""

    def left() -> Iterator[tuple[str, str, float, int]]:
        return missing(read(out), list(tasks or TASKS), list(arms or ARMS))

    def summary(line: dict[str, Any]) -> str:
        return f"{line['heldout_reward']:.4f}, {line['seconds']:.0f} s"

    preload = ("claims.preload",)
    is_done = make_missing(out, jobs=jobs, missing=left, run_one=run_one, summary=summary, preload=preload)
    raise SystemExit(not is_done)


@main.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
def table(path: Path) -> None:
    """Print the results so far as tables."""
    lines = sorted(read(path), key=lambda line: line["seed"])
    best = best_factors(lines)
    for task in TASKS:
        found = {
            arm: [
                line["heldout_reward"]
                for line in lines
                if (line["task"], line["arm"], line["factor"]) == (task, arm, best.get((task, arm)))
                and line["seed"] in SEEDS
            ]
            for arm in ARMS
        }
        base = found["base"]
        click.echo(f"\n{task}\n\n| group | arm | alpha | held-out reward | against base, same seeds |")
        click.echo("|---|---|---|---|---|")
        for arm, rewards in found.items():
            if len(rewards) < len(SEEDS):
                continue
            shift = ""
            if arm != "base" and len(base) == len(SEEDS):
                differences = [one - other for one, other in zip(rewards, base, strict=True)]
                shift = mean_of(differences).text(sign="+")
            alpha = ARMS[arm].alpha * best[task, arm]
            edge = "" if best[task, arm] == FACTORS[task][1] else " (edge)"
            click.echo(
                f"| {ARMS[arm].group} | {arm} | {alpha:g}{edge} | {mean_of(rewards).text()} | {shift} |"
            )


if __name__ == "__main__":
    main()
