"""Pool of worker processes that judge answers; those that hang or die are replaced."""

import asyncio
import collections
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from shardes.config.schema import TaskConfig
from shardes.errors import UserError
from shardes.rewards.processes import ForkServer, WorkerProcess, ending
from shardes.rewards.importing import reference_of
from shardes.rewards.worker import MAX_REWARD, RewardBatch, RewardCaller, RewardOutput
from shardes.tasks.base import Component, Task, all_rewards
from shardes.utils.closing import Closing

logger = logging.getLogger(__name__)

# How long the import of a reward may take.
IMPORT_SECONDS = 600.0
# How long answers wait for a worker before there are more of them.
PATIENCE_SECONDS = 0.5

T = TypeVar("T")

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
        self._setup = [replace(c, function=reference_of(c.function)) for c in components]
        self._timeout_seconds = timeout_seconds
        self._max_workers = max_workers
        self._idle: list[WorkerProcess] = []
        self._waiting: collections.deque[asyncio.Future[WorkerProcess]] = collections.deque()
        # All workers, and those of them that are not ready yet.
        self._num_workers = self._num_starting = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start_fork_server = partial(ForkServer, memory_bytes, may_isolate=may_isolate)
        self._fork_server = self._start_fork_server()
        # Which columns each component looks at, once a worker has imported them; None: all.
        self._columns: list[list[str] | None] = [None] * len(components)
        self._has_told_of_left = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._forwarder = threading.Thread(target=self._forward, name="rewards inbox", daemon=True)
        self._forwarder.start()
        try:
            self._run(self._new_worker()).result()
            obstacle = self._fork_server.obstacle()
        except BaseException:
            self.close()
            raise
        logger.info(
            "rewards run in processes of their own, which %s",
            "see no others" if obstacle is None else f"see those of this machine ({obstacle})",
        )

    def submit(self, components: Sequence[Component], batches: Sequence[RewardBatch]) -> list[PendingRewards]:
        """Have batches judged by worker processes."""
        indices = [self._components.index(component) for component in components]
        futures: list[PendingRewards] = [Future() for _ in batches]

        def judge() -> None:
            for future, batch in zip(futures, batches, strict=True):
                self._background(self._judge_into(future, indices, batch))

        self._inbox.put(judge)
        return futures

    def _forward(self) -> None:
        """Pass on to the event loop what callers put into the inbox.

        Waking the loop lets go of the interpreter's lock and may wait for it for long; this thread has the
        time, a caller that generates does not.
        """
        while (callback := self._inbox.get()) is not None:
            self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """End all processes."""
        if self._loop.is_closed():
            return
        self._inbox.put(None)
        self._forwarder.join()
        self._run(self._cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._fork_server.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _background(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._idle:
            worker.writer.close()

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
                alone.extend(self._background(self._ask(indices, one, limit=half)) for one in batch.alone())
                self._loop.call_soon(self._grow)  # once they wait: whoever is busy may be for long

        def begin() -> None:
            timers.append(self._loop.call_later(half, judge_alone))

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
        needed = [self._columns[i] for i in indices]
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
            worker = await self._acquire()
            begin()
            try:
                async with asyncio.timeout(limit):
                    reply = await worker.ask((indices, batch))
                found = _read_reply(reply, self._names(indices), len(batch))
                left = None if reply["left"] is None else str(reply["left"])
            except TimeoutError:
                self._discard(worker)
                return (
                    f"TimeoutError: the reward did not end within {self._timeout_seconds:g} s "
                    "(task.reward_timeout_seconds)"
                )
            except (EOFError, OSError):
                code = self._discard(worker)
                if code is not None:
                    return f"the reward ended its process ({ending(code)})"
                # The fork server was killed, and with it every worker: this call may not be to blame.
                self._forget_idle_workers()
            except (ValueError, TypeError, KeyError) as error:
                self._discard(worker)
                return f"the reward broke its process ({type(error).__name__}: {error})"
            except BaseException:
                self._discard(worker)
                raise
            if left is None:
                self._release(worker)
            else:
                self._retire(worker, left)
            return found
        return "the process that starts reward processes was killed"

    async def _acquire(self) -> WorkerProcess:
        """Take an idle worker, or wait for one; a long wait starts further workers."""
        if self._idle:
            return self._idle.pop()
        place: asyncio.Future[WorkerProcess] = self._loop.create_future()
        self._waiting.append(place)
        if self._num_workers == 0:
            self._grow()
        else:
            self._loop.call_later(PATIENCE_SECONDS, self._grow)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._release(place.result())
            raise

    def _release(self, worker: WorkerProcess) -> None:
        """Give a worker to whoever has waited longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(worker)
                return
        self._idle.append(worker)

    def _grow(self) -> None:
        """Start a worker for everyone who waits, up to the limit."""
        num_wanted = sum(not place.done() for place in self._waiting) - self._num_starting
        for _ in range(min(num_wanted, self._max_workers - self._num_workers)):
            self._background(self._add_worker(self._new_worker()))

    async def _add_worker(self, new: Coroutine[Any, Any, None]) -> None:
        try:
            await new
        except (UserError, OSError) as error:
            if self._num_workers:
                return
            for place in self._waiting:  # nobody else will come
                if not place.done():
                    place.set_exception(RuntimeError(f"no process for rewards can be started: {error}"))
            self._waiting.clear()

    def _new_worker(self) -> Coroutine[Any, Any, None]:
        """Start a worker that imports the rewards; it counts from this call, not from when that begins."""
        self._num_workers += 1
        self._num_starting += 1
        return self._start_worker()

    async def _start_worker(self) -> None:
        try:
            worker = await self._fork()
        except BaseException:
            self._num_workers -= 1
            self._num_starting -= 1
            raise
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                reply = await worker.ask(self._setup)
                error = reply["error"]
        except TimeoutError:
            error = f"importing it took longer than {IMPORT_SECONDS:g} s"
        except (EOFError, OSError):
            error = f"importing it ended the process ({ending(self._fork_server.kill(worker.pid))})"
        except BaseException:
            self._discard(worker)
            raise
        finally:
            self._num_starting -= 1
        if error is not None:
            self._discard(worker)
            raise UserError(f"task.reward: {error}")
        self._columns = reply["columns"]
        self._release(worker)

    async def _fork(self) -> WorkerProcess:
        """Fork a worker; if the fork server is gone, start another first."""
        try:
            pid, connection = self._fork_server.fork()
        except OSError:
            self._fork_server.close()
            self._fork_server = self._start_fork_server()
            pid, connection = self._fork_server.fork()
        return WorkerProcess(pid, *await asyncio.open_unix_connection(sock=connection))

    def _discard(self, worker: WorkerProcess) -> int | None:
        """Kill a worker, replace it if somebody waits, and return its exit code (see ``kill``) if known."""
        self._num_workers -= 1
        worker.writer.close()
        code = None
        with contextlib.suppress(OSError):
            code = self._fork_server.kill(worker.pid)
        self._grow()
        return code

    def _retire(self, worker: WorkerProcess, left: str) -> None:
        """Replace a worker in which a reward has left something behind that may disturb others."""
        if not self._has_told_of_left:
            self._has_told_of_left = True
            logger.warning(
                "a reward has left %.200s behind, so its process is replaced after such calls, and the "
                "reward imported again; to avoid that, end what a call starts, or start it at import",
                left,
            )
        self._discard(worker)

    def _forget_idle_workers(self) -> None:
        for worker in self._idle:
            worker.writer.close()
        self._num_workers -= len(self._idle)
        self._idle.clear()


def _read_reply(reply: Any, names: Sequence[str], num_completions: int) -> RewardOutput:
    """Check a worker's reply, which a reward may have forged, and return what it says.

    Raises:
        ValueError, TypeError, KeyError: It is not what a worker sends.
    """
    components = {name: list(reply["components"][name]) for name in names}
    output = RewardOutput(components, list(map(bool, reply["has_failed"])), reply["first_failure"])
    if {len(column) for column in (*components.values(), output.has_failed)} != {num_completions}:
        raise ValueError("a reply of the wrong size")
    values = itertools.chain.from_iterable(components.values())
    if not all(value is None or (isinstance(value, float) and abs(value) < MAX_REWARD) for value in values):
        raise ValueError("a reply that is not made of numbers")
    if not isinstance(output.first_failure, str | None):
        raise TypeError("a reply whose message is no text")
    return output
