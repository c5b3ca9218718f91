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


class Members:
    """Members of a session's population, evaluated over all ranks; every method is a collective of these.

    Args:
        session: Session with base weights.
        work: What members answer.
    """

    def __init__(self, session: Any, work: Work) -> None:
        from shardes.es.strategy import Strategy
        from shardes.rollout.build import make_evaluator, make_scheduler
        from shardes.tasks.loading import load_task

        self._session, self._work = session, work
        self._task = load_task(session.config.task)
        self.evaluator, *_ = make_evaluator(session, self._task)
        self._scheduler = make_scheduler(session, self.evaluator)
        self._strategy = Strategy(session.config.es, num_elements=0)
        # As many as are evaluated at the same time.
        self.at_once = max(1, session.mesh.world.world_size // self.evaluator.engine.group.world_size)

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Evaluate the first members of an iteration; return seconds by phase, and "member" for all."""
        from shardes.rollout.iteration import IterationSpec

        spec = IterationSpec(iteration, self._task.train, self.evaluator, self._strategy)
        self._session.timer.take()
        wait_for_device()
        start = time.perf_counter()
        self._scheduler.evaluate_members(list(range(self.at_once)), spec=spec, on_result=lambda _: None)
        wait_for_device()
        return dict(self._session.timer.take()) | {"member": time.perf_counter() - start}

    def measure(self, context: Context, *, prefix: str = "") -> None:
        """Record a member by phase, an update and the memory, under names that begin with ``prefix``."""
        session, work = self._session, self._work
        world = session.mesh.world
        self.evaluate(0)
        reset_peak(world.device)
        seconds = self.evaluate(1)
        found: dict[str, Any] = {f"{name}_seconds": value for name, value in seconds.items()}
        num_tokens = self.at_once * work.num_rows * work.new_tokens
        found |= {"members_at_once": self.at_once, "job_tokens_per_second": num_tokens / seconds["member"]}
        found |= {"update_seconds": self._update_seconds(), **self._memory()}
        if not world.is_main:
            return
        context.record(**{f"{prefix}{name}": value for name, value in found.items()})
        if "peak_bytes" in found:
            is_near = 0.85 < found["peak_over_planned"] < 1.15
            shown = f"{found['peak_bytes'] / 2**30:.1f} GiB, planned {found['planned_bytes'] / 2**30:.1f}"
            context.check(f"{prefix}peak memory is within 15% of the plan", is_near, detail=shown)

    def _update_seconds(self) -> float:
        """Return the seconds of an update by ``NUM_DIRECTIONS`` directions, after one that warms up."""
        from shardes.es.update import Update

        for number in range(2):
            wait_for_device()
            start = time.perf_counter()
            self._session.weights.update(Update(number, [1e-6] * NUM_DIRECTIONS))
            wait_for_device()
            seconds = time.perf_counter() - start
        return seconds

    def _memory(self) -> dict[str, Any]:
        """Return this rank's peak memory and that of the plan."""
        world, gather = self._session.mesh.world, self.evaluator.engine.gather
        assert gather is not None, "members were evaluated"
        planned = planned_bytes(
            self._session.config,
            gather=gather,
            num_ranks=world.world_size,
            prompt_tokens=self._work.prompt_tokens,
            num_prompts=self._work.num_rows,
        )
        found: dict[str, Any] = {"gather": gather, "planned_bytes": planned}
        if world.device.type == "cuda":
            peak = peak_bytes(world.device)
            free, total = torch.cuda.mem_get_info(world.device)
            found |= {"peak_bytes": peak, "peak_over_planned": peak / planned}
            found |= {
                "reserved_bytes": torch.cuda.max_memory_reserved(world.device),
                "used_bytes": total - free,
            }
        return found
