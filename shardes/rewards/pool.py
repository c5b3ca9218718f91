"""Pool of worker processes that judge answers; those that hang or die are replaced."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Protocol

from shardes.config.schema import TaskConfig
from shardes.errors import UserError
from shardes.rewards.batch import RewardBatch, RewardOutput
from shardes.rewards.crew import Crew
from shardes.rewards.importing import reference_of
from shardes.rewards.processes import ForkServer, ending, read_reply
from shardes.rewards.worker import RewardCaller
from shardes.tasks.base import Component, Task, all_rewards
from shardes.utils.background import BackgroundLoop
from shardes.utils.closing import Closing

logger = logging.getLogger(__name__)

PendingRewards = Future[RewardOutput]
"""Rewards that are being computed."""


class RewardRunner(Protocol):
    """Runner of reward functions, in this process or in others."""

    def submit(self, components: Sequence[Component], batches: Sequence[RewardBatch]) -> list[PendingRewards]:
        """Have batches judged, each by itself; a result has every component but no weighted sum."""


class InProcessRewards(Closing):
    """Reward runner in this process; nothing stops a reward that hangs.

    Args:
        components: All components that ``submit`` will ever be given.

    Raises:
        UserError: A function does not exist, or importing it fails.
    """

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = list(components)
        try:
            self._caller = RewardCaller(components)
        except ValueError as error:
            raise UserError(f"task.reward: {error}") from None

    def submit(self, components: Sequence[Component], batches: Sequence[RewardBatch]) -> list[PendingRewards]:
        """Judge batches before it returns."""
        indices = [self._components.index(component) for component in components]
        futures: list[PendingRewards] = [Future() for _ in batches]
        for future, batch in zip(futures, batches, strict=True):
            future.set_result(self._caller.judge(indices, batch))
        return futures


def make_reward_runner(config: TaskConfig, tasks: Sequence[Task]) -> "InProcessRewards | RewardProcessPool":
    """Make the runner of some tasks' rewards, as the configuration has it.

    Raises:
        UserError: A function does not exist, or importing it fails.
    """
    components = all_rewards(tasks)
    if not components or config.reward_workers == 0:
        return InProcessRewards(components)
    return RewardProcessPool(
        components,
        timeout_seconds=config.reward_timeout_seconds,
        max_workers=config.reward_workers,
        memory_bytes=config.reward_memory_bytes,
        may_isolate=config.reward_isolation == "auto",
    )


class RewardProcessPool(Closing):
    """Reward runner in worker processes.

    A call judges a batch. If it has not ended after half of the time limit, or if it failed, its completions
    are also judged one by one in other workers, for at most the other half; these results count if the call
    fails or does not end within the limit. So completions whose reward hangs fail by themselves, and as long
    as there are workers for all of them, they cost the time limit once.

    Args:
        components: All components that ``submit`` will ever be given.
        timeout_seconds: The time limit of a call.
        max_workers: Processes at most. There is one at first; more come when answers have to wait.
        memory_bytes: Address space of a process; None: no limit.
        may_isolate: Has processes see only themselves, where the kernel allows it.

    Raises:
        UserError: A function cannot be found by another process, or importing it fails there.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        timeout_seconds: float,
        max_workers: int,
        memory_bytes: int | None,
        may_isolate: bool = False,
    ) -> None:
        self._components = list(components)
        self._timeout_seconds = timeout_seconds
        self._background = BackgroundLoop("rewards")
        self._crew = Crew(
            [replace(c, function=reference_of(c.function)) for c in components],
            max_workers=max_workers,
            start_fork_server=partial(ForkServer, memory_bytes, may_isolate=may_isolate),
            background=self._background.start,
        )
        try:
            self._background.run(self._crew.start()).result()
        except BaseException:
            self.close()
            raise
        self._has_told_of_isolation = False

    def submit(self, components: Sequence[Component], batches: Sequence[RewardBatch]) -> list[PendingRewards]:
        """Have batches judged by worker processes."""
        self._tell_of_isolation()
        indices = [self._components.index(component) for component in components]
        futures: list[PendingRewards] = [Future() for _ in batches]

        def judge() -> None:
            for future, batch in zip(futures, batches, strict=True):
                self._background.start(self._judge_into(future, indices, batch))

        self._background.call(judge)
        return futures

    def _tell_of_isolation(self) -> None:
        # Not when the pool is made: that is before logs are set up.
        if not self._has_told_of_isolation:
            self._has_told_of_isolation = True
            obstacle = self._crew.obstacle
            logger.info(
                "rewards run in processes of their own, which %s",
                "see no others" if obstacle is None else f"see those of this machine ({obstacle})",
            )

    def close(self) -> None:
        """End all processes."""
        if self._background.is_running:
            self._background.stop(self._crew.forget_idle)
            self._crew.close()

    async def _judge_into(self, future: PendingRewards, indices: list[int], batch: RewardBatch) -> None:
        try:
            future.set_result(await self._judge(indices, batch))
        except asyncio.CancelledError:
            future.cancel()
            raise
        except Exception as error:
            future.set_exception(error)

    async def _judge(self, indices: list[int], batch: RewardBatch) -> RewardOutput:
        """Judge a batch, whatever its rewards do to a worker."""
        half = self._timeout_seconds / 2
        batch = self._with_needed_columns(indices, batch)
        alone: list[asyncio.Task[RewardOutput | str]] = []
        timers: list[asyncio.TimerHandle] = []

        def judge_alone() -> None:
            if not alone and len(batch) > 1:
                alone.extend(
                    self._background.start(self._ask(indices, one, limit=half)) for one in batch.alone()
                )
                self._background.loop.call_soon(
                    self._crew.grow
                )  # once they wait: whoever is busy may be for long

        def begin() -> None:
            timers.append(self._background.loop.call_later(half, judge_alone))

        try:
            found = await self._ask(indices, batch, limit=self._timeout_seconds, begin=begin)
            if isinstance(found, RewardOutput):
                return found
            judge_alone()
            if not alone:
                return RewardOutput.failed(self._names(indices), len(batch), found)
            parts = [
                RewardOutput.failed(self._names(indices), 1, part) if isinstance(part, str) else part
                for part in await asyncio.gather(*alone)
            ]
            joined = RewardOutput.concatenated(parts)
            return replace(joined, first_failure=joined.first_failure or found)
        finally:
            for timer in timers:
                timer.cancel()
            for task in alone:
                task.cancel()

    def _with_needed_columns(self, indices: list[int], batch: RewardBatch) -> RewardBatch:
        """Leave out columns that no reward looks at; they may hold images."""
        needed = [self._crew.columns[i] for i in indices]
        if any(names is None for names in needed):
            return batch
        return batch.with_columns({name for names in needed for name in names or ()})

    def _names(self, indices: Sequence[int]) -> list[str]:
        return [self._components[i].name for i in indices]

    async def _ask(
        self,
        indices: list[int],
        batch: RewardBatch,
        *,
        limit: float,
        begin: Callable[[], None] = lambda: None,
    ) -> RewardOutput | str:
        """Return a worker's output, or why there is none; ``begin`` is called when the worker starts."""
        for _ in range(2):
            worker = await self._crew.acquire()
            begin()
            try:
                async with asyncio.timeout(limit):
                    reply = await worker.ask((indices, batch))
                found = read_reply(reply, self._names(indices), len(batch))
                left = reply["left"]
            except TimeoutError:
                self._crew.discard(worker)
                return (
                    f"TimeoutError: the reward did not end within {self._timeout_seconds:g} s "
                    "(task.reward_timeout_seconds)"
                )
            except (EOFError, OSError):
                code = self._crew.discard(worker)
                if code is not None:
                    return f"the reward ended its process ({ending(code)})"
                # The fork server was killed, and with it every worker: this call may not be to blame.
                self._crew.forget_idle()
            except (ValueError, TypeError, KeyError) as error:
                self._crew.discard(worker)
                return f"the reward broke its process ({type(error).__name__}: {error})"
            except BaseException:
                self._crew.discard(worker)
                raise
            else:
                if left is None:
                    self._crew.release(worker)
                else:
                    self._crew.retire(worker, left)
                return found
        return "the process that starts reward processes was killed"
