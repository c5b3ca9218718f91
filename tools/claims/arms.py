"""Arms of the study as data: tasks, and what is tried on each of them.

An arm with another option of the algorithm is one more entry of ``ARMS``: the keys it changes, the tasks on
which it runs, and by how much its steps are longer than those of plain ES.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Longest part of a sweep that is tried beyond its first four step sizes, on either side.
MAX_EXTENSIONS = 4


@dataclass(frozen=True)
class StudyTask:
    """Task of the study, with what all arms have on it.

    Attributes:
        config: YAML file, relative to the root of the repository.
        overrides: Keys that differ from the file.
        num_completions: Number of answers that each run may generate.
        first_steps: Smallest step size of the sweep, by method.
        seeds: Seeds of the runs that are reported.
        seeds_of: Those of arms that have others, by arm.
        tuning_seeds: Seeds of the sweeps; the step size with the best mean is taken.
        grpo: Options of GRPO that all its arms have.
        num_steps: Number of step sizes of a sweep, before it is extended.
        num_evaluations: Number of evaluations of a run, besides that of the base model.
        kl_prompts: Number of held-out problems on whose answers the divergence is estimated.
    """

    config: str
    num_completions: int
    first_steps: dict[str, float]
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    seeds_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tuning_seeds: tuple[int, ...] = (100,)
    grpo: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 4
    num_evaluations: int = 10
    kl_prompts: int = 128


@dataclass(frozen=True)
class Arm:
    """Method, with something changed.

    Attributes:
        method: ``es`` or ``grpo``.
        changes: Keys of shardes's configuration for ES, options of GRPO for GRPO.
        changes_of: Those on single tasks besides, by task.
        tasks: Names of the tasks on which it runs.
        scale: Factor of all its step sizes.
        answers: Answers that an iteration generates, as a share of those of all members to all problems, by
            task; all of them on the others.
        budget: Answers of a run, as a share of the task's.
        step_of: Name of the arm whose best step size it has; None: it has a sweep of its own.
        step: Step size of all its runs, which then have no sweep; None: the best one.
        evidence: Part of the page that it belongs to: ``main``, ``delay``, ``hacking`` or ``options``.
    """

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    changes_of: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("quickstart", "addition", "receipts", "conciseness")
    scale: float = 1.0
    answers: dict[str, float] = field(default_factory=dict)
    budget: float = 1.0
    step_of: str | None = None
    step: float | None = None
    evidence: str = "main"


# What the two tasks on a real model have alike. An answer costs GRPO a second on one core, ten times what it
# costs ES, because it has to be generated, propagated back, and the weights converted for each forward.
SMOLLM2: dict[str, Any] = {
    "num_completions": 1280,
    "overrides": {"task.batch_size": 8},
    "first_steps": {"es": 0.0022, "grpo": 3e-6},
    "seeds": (1, 2),
    "grpo": {"prompts_per_step": 4, "micro_batch_size": 32, "bfloat16": True},
    "num_steps": 3,
    "num_evaluations": 4,
    "kl_prompts": 16,
}

# Of the toys: five seeds did not tell whether these arms need half of the answers.
TEN_SEEDS = dict.fromkeys(
    ("es", "es, small steps, half", "es, small steps, half, racing"), tuple(range(1, 11))
)

TASKS = {
    "quickstart": StudyTask(
        "configs/quickstart.yaml",
        num_completions=40960,
        first_steps={"es": 0.005, "grpo": 1e-4},
        seeds_of=TEN_SEEDS,
        grpo={"prompts_per_step": 64},
    ),
    "addition": StudyTask(
        "configs/quickstart.yaml",
        overrides={
            "model.path": "configs/addition/model",
            "task.name": None,
            "task.data": "configs/addition/train.jsonl",
            "task.heldout_data": "configs/addition/heldout.jsonl",
            "task.reward": "configs/addition/reward.py:digits",
            "rollout.max_new_tokens": 4,
        },
        num_completions=24576,
        first_steps={"es": 0.002, "grpo": 1e-4},
        seeds_of=TEN_SEEDS,
        grpo={"prompts_per_step": 64},
    ),
    "receipts": StudyTask("configs/smollm2/receipts.yaml", **SMOLLM2),
    # With 1280 answers plain ES earns all that can be earned, so options are compared with half as many. Two
    # seeds decide their steps, since one was a lucky one.
    "receipts-640": StudyTask(
        "configs/smollm2/receipts.yaml",
        **{
            **SMOLLM2,
            "num_completions": 640,
            "first_steps": {"es": 0.007},
            "tuning_seeds": (100, 101),
            "seeds_of": dict.fromkeys(("es", "es, 2 problems", "es, racing"), (1, 2, 3, 4, 5)),
        },
    ),
    "conciseness": StudyTask("configs/smollm2/conciseness.yaml", **{**SMOLLM2, "num_completions": 640}),
}

TOYS = ("quickstart", "addition")
OPTIONS = (*TOYS, "receipts-640")
RACING = {"rounds": 4, "keep": 0.5}
# All members answer a quarter of the problems, half of them another one, and so on.
RACING_ANSWERS = (1 + 1 / 2 + 1 / 4 + 1 / 8) / 4
SMALL_STEPS = {"es.population": 16, "task.batch_size": 16}
ARMS = {
    "es": Arm("es", tasks=tuple(TASKS)),
    "grpo": Arm("grpo"),
    # Four times as many updates, each of a quarter of the answers.
    "grpo, small steps": Arm("grpo", {"prompts_per_step": 16}, tasks=TOYS),
    # Reward at the end of several answers only. What a member of ES earns is the mean of all its answers in
    # any case: for ES these are the same run.
    "grpo, reward after 4 answers": Arm("grpo", {"bundle": 4}, tasks=("addition",), evidence="delay"),
    "grpo, reward after 16 answers": Arm("grpo", {"bundle": 16}, tasks=("addition",), evidence="delay"),
    **{
        f"grpo, KL penalty {beta}": Arm(
            "grpo", {"beta": beta}, tasks=("conciseness",), step_of="grpo", evidence="hacking"
        )
        for beta in (0.01, 0.1)
    },
    # Options of the algorithm, at equal tokens: where an iteration asks less, there are more of them.
    "es, 4 subspaces": Arm("es", {"es.subspaces": 4}, tasks=OPTIONS, evidence="options"),
    "es, 16 subspaces": Arm("es", {"es.subspaces": 16}, tasks=OPTIONS, evidence="options"),
    # The shares that were found; few of the real task's problems come twice in a run.
    "es, screening": Arm(
        "es",
        {"task.screening": {}},
        tasks=OPTIONS,
        answers={"quickstart": 0.87, "addition": 0.98},
        evidence="options",
    ),
    "es, racing": Arm(
        "es",
        {"es.racing": RACING},
        {
            "quickstart": {"rollout.micro_batch_size": 16},
            "addition": {"rollout.micro_batch_size": 16},
            "receipts-640": {"rollout.micro_batch_size": 2},
        },
        tasks=OPTIONS,
        answers=dict.fromkeys(OPTIONS, RACING_ANSWERS),
        evidence="options",
    ),
    # An eighth of the answers in an iteration, so there are eight times as many; and with half of the answers
    # in all. Shorter steps, since there are more.
    "es, half": Arm("es", tasks=TOYS, budget=0.5, evidence="options"),
    "es, small steps": Arm("es", SMALL_STEPS, tasks=TOYS, evidence="options"),
    "es, small steps, half": Arm("es", SMALL_STEPS, tasks=TOYS, scale=0.63, budget=0.5, evidence="options"),
    # The two best together.
    "es, small steps, half, racing": Arm(
        "es",
        {**SMALL_STEPS, "es.racing": RACING, "rollout.micro_batch_size": 4},
        tasks=TOYS,
        scale=0.63,
        answers=dict.fromkeys(TOYS, RACING_ANSWERS),
        budget=0.5,
        evidence="options",
    ),
    "es, 2 problems": Arm("es", {"task.batch_size": 2}, tasks=("receipts-640",), evidence="options"),
    # The two best together: half of the members answer only the first two of four problems.
    "es, 4 problems, racing": Arm(
        "es",
        {
            "task.batch_size": 4,
            "es.racing": {"rounds": 2, "keep": 0.5},
            "rollout.micro_batch_size": 2,
        },
        tasks=("receipts-640",),
        answers={"receipts-640": 0.75},
        evidence="options",
    ),
    # About as long as GRPO takes for 1280 answers, at the step size that was best with 640 and one seed.
    "es, 2 problems, GRPO's time": Arm(
        "es", {"task.batch_size": 2}, tasks=("receipts",), budget=1.125, step=0.007, evidence="options"
    ),
    "es, reuse of members": Arm("es", {"es.member_reuse": 0.5}, tasks=OPTIONS, evidence="options"),
    "es, step rule": Arm("es", {"es.step_rule": "reliability"}, tasks=OPTIONS, evidence="options"),
    "es, low rank": Arm("es", {"es.noise": "low_rank"}, tasks=OPTIONS, evidence="options"),
}


def step_size(task: str, arm: str, place: int) -> float:
    """Return a step size of an arm's sweep, two of which are a factor of ten apart.

    Args:
        task: Name of the task.
        arm: Name of the arm.
        place: Number in the sweep; 0 for the first one, below 0 for one before that.
    """
    first = TASKS[task].first_steps[ARMS[arm].method] * ARMS[arm].scale
    return float(f"{first * 10 ** (place / 2):.2g}")


def num_completions(task: str, arm: str) -> int:
    """Return the number of answers that each run of an arm may generate on a task."""
    return int(TASKS[task].num_completions * ARMS[arm].budget)


def options_on(task: str, arm: str) -> dict[str, Any]:
    """Return what an arm sets on a task: keys of shardes's configuration, or options of GRPO."""
    of_all = TASKS[task].grpo if ARMS[arm].method == "grpo" else {}
    return {**of_all, **ARMS[arm].changes, **ARMS[arm].changes_of.get(task, {})}


def seeds_on(task: str, arm: str) -> tuple[int, ...]:
    """Return the seeds of an arm's reported runs on a task."""
    return TASKS[task].seeds_of.get(arm, TASKS[task].seeds)


def definition(task: str, arm: str) -> dict[str, Any]:
    """Return what a line must have been made with to be a result of an arm on a task."""
    asked, tried = TASKS[task], ARMS[arm]
    return {
        "method": tried.method,
        "config": asked.config,
        "overrides": asked.overrides,
        "options": options_on(task, arm),
        "num_completions": num_completions(task, arm),
        **({"answers": tried.answers[task]} if task in tried.answers else {}),
    }
