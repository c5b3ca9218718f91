"""A dry run: everything is built and tried once, nothing is trained, and no run directory is made."""

import resource
import time
from functools import partial

import torch
from transformers import PreTrainedModel

from shardes.environments.runners import Environments
from shardes.planning.machine import Machine
from shardes.planning.plan import Plan
from shardes.planning.report import report
from shardes.planning.sources import check_files
from shardes.planning.workload import make_workload
from shardes.rewards.pool import RewardRunner
from shardes.rollout.build import make_rollout
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.memory import free_bytes
from shardes.runs.journal import recorded_setting
from shardes.runs.reporting import peak_memory_bytes
from shardes.session import Session
from shardes.tasks.base import Task
from shardes.utils.units import shown_bytes, shown_seconds

# Number of problems that the member answers.
_NUM_PROBLEMS = 2


def dry_run(
    session: Session,
    task: Task,
    *,
    model: PreTrainedModel,
    rewards: RewardRunner,
    environments: Environments | None = None,
    encoder: PromptEncoder | None = None,
) -> list[str]:
    """Evaluate one member on two problems, and plan for the ranks and memory that are here; a collective.

    Args:
        session: The model with its base weights.
        task: What would be trained on.
        model: The model, its parameters on meta.
        rewards: Runs rewards.
        environments: Run episodes; None: they run in this process.
        encoder: Has the tokens of its prompts; None: a new one, which makes them when they are asked.

    Returns:
        The page of the plan and the result of the member, by line.
    """
    world = session.mesh.world
    recorded = partial(recorded_setting, session.config.run.dir)
    rollout = make_rollout(
        session, task, recorded=recorded, rewards=rewards, environments=environments, encoder=encoder
    )
    rollout.begin()
    start = time.monotonic()
    spec = rollout.spec(0, num_problems=_NUM_PROBLEMS)
    result = rollout.scheduler.evaluate_members([0], spec=spec, on_result=lambda _: None)[0]
    seconds, peak = time.monotonic() - start, peak_memory_bytes(world.device)
    config = rollout.config
    plan = Plan(
        config,
        model,
        workload=make_workload(config, task=task, encoder=rollout.encoder),
        machine=Machine(_memory_bytes(world.device), world.device.type),
        world_size=world.world_size,
    )
    reward = "no reward" if result.reward is None else f"reward {result.reward:.4f}"
    return [
        *report(plan, files=check_files(config.model, model)),
        "",
        f"dry run    one member, {_NUM_PROBLEMS} prompts: {reward}, {result.num_tokens} tokens in "
        f"{shown_seconds(seconds)}, rollout.gather: {rollout.evaluator.engine.gather}, "
        f"{shown_bytes(peak)} at most on rank 0",
        "dry run    nothing was trained, and nothing was written",
    ]


def _memory_bytes(device: torch.device) -> int:
    """Return the bytes of the accelerator, or else of host memory that this rank uses or could use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_bytes(device) + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
