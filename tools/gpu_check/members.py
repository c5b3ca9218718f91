"""A member of a large random model, by phase, with the memory that it takes against the plan."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from gpu_check.devices import peak_bytes, reset_peak, wait_for_device
from gpu_check.part import Context
from gpu_check.random_model import planned_bytes

NUM_DIRECTIONS = 30


@dataclass(frozen=True)
class Work:
    """What members answer.

    Attributes:
        num_rows: Number of prompts, all in one micro-batch.
        prompt_tokens: Tokens of the longest prompt.
        new_tokens: Tokens of every answer.
    """

    num_rows: int
    prompt_tokens: int
    new_tokens: int


def measure(context: Context, session: Any, work: Work, *, prefix: str = "") -> Any:
    """Measure a member, an update and the memory; return the rollout's evaluator. A collective of all ranks.

    Args:
        context: Where figures are recorded, their names after ``prefix``.
        session: Session with base weights.
        work: What members answer.
        prefix: Beginning of the figures' names.
    """
    from shardes.es.strategy import Strategy
    from shardes.es.update import Update
    from shardes.rollout.build import make_evaluator, make_scheduler
    from shardes.rollout.iteration import IterationSpec
    from shardes.tasks.loading import load_task

    config, world = session.config, session.mesh.world
    task = load_task(config.task)
    evaluator, *_ = make_evaluator(session, task)
    scheduler = make_scheduler(session, evaluator)
    strategy = Strategy(config.es, num_elements=0)

    def evaluate(iteration: int, count: int) -> dict[str, float]:
        spec = IterationSpec(iteration, task.train, evaluator, strategy)
        session.timer.take()
        wait_for_device()
        start = time.perf_counter()
        scheduler.evaluate_members(list(range(count)), spec=spec, on_result=lambda _: None)
        wait_for_device()
        return session.timer.take() | {"member": time.perf_counter() - start}

    # As many as are evaluated at the same time.
    at_once = max(1, world.world_size // evaluator.engine.group.world_size)
    evaluate(0, at_once)
    reset_peak(world.device)
    seconds = evaluate(1, at_once)
    found = {f"{name}_seconds": value for name, value in seconds.items()}
    found["generated_tokens_per_second"] = at_once * work.num_rows * work.new_tokens / seconds["member"]
    coefficients = [1e-6] * NUM_DIRECTIONS
    session.weights.update(Update(0, coefficients))
    wait_for_device()
    start = time.perf_counter()
    session.weights.update(Update(1, coefficients))
    wait_for_device()
    found["update_seconds"] = time.perf_counter() - start
    gather = evaluator.engine.gather
    planned = planned_bytes(
        config,
        gather=gather,
        num_ranks=world.world_size,
        prompt_tokens=work.prompt_tokens,
        num_prompts=work.num_rows,
    )
    memory: dict[str, Any] = {"gather": gather, "planned_bytes": planned}
    if world.device.type == "cuda":
        peak = peak_bytes(world.device)
        free, total = torch.cuda.mem_get_info(world.device)
        memory |= {"peak_bytes": peak, "peak_over_planned": peak / planned}
        memory |= {"reserved_bytes": torch.cuda.max_memory_reserved(world.device), "used_bytes": total - free}
    if world.is_main:
        context.record(**{f"{prefix}{name}": value for name, value in (found | memory).items()})
        if "peak_bytes" in memory:
            is_near = 0.85 < memory["peak_over_planned"] < 1.15
            shown = f"{memory['peak_bytes'] / 2**30:.1f} GiB, planned {planned / 2**30:.1f}"
            context.check(f"{prefix}peak memory is within 15% of the plan", is_near, detail=shown)
    return evaluator
