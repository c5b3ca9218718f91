"""A dry run: everything is built and tried once, nothing is trained, and no run directory is made."""

import resource

import torch

from shardes.models.build import load_tokenizer
from shardes.planning.machine import Machine
from shardes.planning.plan import Plan
from shardes.planning.report import report
from shardes.planning.sources import check_files, skeleton
from shardes.planning.workload import make_workload
from shardes.rollout.memory import free_bytes
from shardes.session import Session
from shardes.tasks.base import Task
from shardes.trainer import TrainingLoop
from shardes.utils.units import shown_bytes, shown_seconds

# Number of problems that the member answers.
_NUM_PROBLEMS = 2


def dry_run(session: Session, trainer: TrainingLoop, task: Task) -> list[str]:
    """Evaluate one member on two problems, and plan for the ranks and the memory of this job; a collective.

    Args:
        session: Session with the base weights.
        trainer: Training loop, ready to train.
        task: Task to train on.

    Returns:
        The page of the plan and the result of the member, by line.
    """
    config, world = session.config, session.mesh.world
    found = trainer.dry_run(_NUM_PROBLEMS)
    rollout = config.rollout.model_copy(update={"micro_batch_size": found.micro_batch_size})
    config = config.model_copy(update={"rollout": rollout})
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    model = skeleton(config)
    plan = Plan(
        config,
        model,
        workload=make_workload(config, task=task, tokenizer=tokenizer),
        machine=Machine(_memory_bytes(world.device), world.device.type),
        world_size=world.world_size,
    )
    result = found.result
    reward = "no reward" if result.reward is None else f"reward {result.reward:.4f}"
    return [
        *report(plan, files=check_files(config.model.path, model)),
        "",
        f"dry run    one member, {_NUM_PROBLEMS} prompts: {reward}, {result.num_tokens} tokens in "
        f"{shown_seconds(found.seconds)}, rollout.gather: {found.mode_name}, "
        f"{shown_bytes(found.peak_memory_bytes)} at most on rank 0",
        "dry run    nothing was trained, and nothing was written",
    ]


def _memory_bytes(device: torch.device) -> int:
    """Return the bytes of the accelerator, or else of host memory that this rank uses or could use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return free_bytes(device) + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
