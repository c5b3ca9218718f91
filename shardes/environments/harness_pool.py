"""Rank's side of harnesses: processes that play episodes through the endpoint, ended when they hang."""

import asyncio
from concurrent.futures import Future
from functools import partial
from typing import Any

from shardes.endpoint.request_queue import Credentials, RequestQueue
from shardes.environments.adapters.registry import HARNESSES
from shardes.environments.base import HarnessOutcome, HarnessSpec
from shardes.errors import UserError
from shardes.rewards.batch import RewardBatch, RewardOutput
from shardes.rewards.crew import IMPORT_SECONDS, Crew
from shardes.rewards.processes import ForkServer, WorkerProcess, ending, read_reply
from shardes.tasks.base import Component, Row
from shardes.utils.background import BackgroundLoop
from shardes.utils.closing import Closing

MAX_TRIES = 5
"""How often an episode is begun between two answers, if its process ends each time."""

_NAME = "harness"
_WORKER = "shardes.environments.harness_worker"


class HarnessPool(Closing):
    """Player of episodes in worker processes, each of which plays one at a time.

    A process that neither asks nor ends for longer than the limit is killed, and the episode has failed; the
    time in which it waits for answers does not count. If a process ends by itself, killed from outside, say,
    the episode is begun again in another one, which gets the same answers to the same requests.

    Args:
        spec: The harness.
        queue: Where episodes have their places.
        key: Key of the configuration that names the harness, for messages.
        timeout_seconds: The limit.
        max_workers: Processes at most.
        memory_bytes: Address space of a process; None: no limit.
        may_isolate: Has processes see only themselves, where the kernel allows it.

    Attributes:
        num_kills: Processes that have ended or were ended before their time, so far.

    Raises:
        UserError: The harness does not exist, importing it fails, or it cannot be called.
    """

    def __init__(
        self,
        spec: HarnessSpec,
        queue: RequestQueue,
        *,
        key: str,
        timeout_seconds: float,
        max_workers: int,
        memory_bytes: int | None = None,
        may_isolate: bool = False,
    ) -> None:
        self.num_kills = 0
        self._queue, self._key = queue, key
        self._timeout_seconds = timeout_seconds
        given = {"reference": spec.reference, "arguments": dict(spec.arguments)}
        # An adapter's processes are forked from one that has imported its package.
        module = spec.reference.partition(":")[0] if spec.reference in HARNESSES.values() else _WORKER
        start_fork_server = partial(
            ForkServer, memory_bytes, may_isolate=may_isolate, serve=f"{module}:serve"
        )
        self._background = BackgroundLoop("harnesses")
        self._crew = Crew(
            # The second one is never called: it has the harness imported before the first is.
            [
                Component(_NAME, f"{_WORKER}:play", arguments=given),
                Component("imported", spec.reference),
            ],
            max_workers=max_workers,
            start_fork_server=start_fork_server,
            background=self._background.start,
        )
        try:
            self._background.run(self._start()).result()
        except BaseException:
            self.close()
            raise

    def begin(self, credentials: Credentials, row: Row, url: str) -> "Future[HarnessOutcome]":
        """Begin an episode at its place, whose base URL is ``url``, and return at once."""
        future: Future[HarnessOutcome] = Future()

        async def play() -> None:
            try:
                future.set_result(await self._play(credentials, row, url))
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as error:
                self._queue.end(credentials.episode)
                future.set_exception(error)

        def start() -> None:
            self._background.start(play())

        self._background.call(start)
        return future

    def close(self) -> None:
        """End all processes."""
        if self._background.is_running:
            self._background.stop(self._crew.forget_idle)
            self._crew.close()

    async def _start(self) -> None:
        """Start the first process, and have it look at the harness."""
        try:
            await self._crew.start()
        except UserError as error:
            raise UserError(str(error).replace("task.reward", self._key, 1)) from None
        worker = await self._crew.acquire()
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                reply = await worker.ask(([0], _batch(None, "", Credentials("", "", ""))))
            found = read_reply(reply, [_NAME], 1)
        except (EOFError, OSError, ValueError, TypeError, KeyError) as error:  # TimeoutError, too
            self._crew.discard(worker)
            raise UserError(
                f"{self._key}: looking at it ended its process ({type(error).__name__}: {error})"
            ) from None
        self._crew.release(worker)
        if found.first_failure is not None:
            raise UserError(f"{self._key}: {_reason(found)}")

    async def _play(self, credentials: Credentials, row: Row, url: str) -> HarnessOutcome:
        num_tries = num_answers = 0
        while True:
            # Once it waits for a process, there is one more: all of a cohort live at the same time.
            self._background.loop.call_soon(self._crew.grow)
            worker = await self._crew.acquire()
            self._queue.begin(credentials.episode)
            try:
                found, is_lost = await self._ask(worker, credentials, row, url)
            except BaseException:
                self._crew.discard(worker)
                raise
            answered = self._queue.num_answers(credentials.episode)
            num_tries = 1 if answered > num_answers else num_tries + 1
            num_answers = answered
            if not is_lost or num_tries == MAX_TRIES:
                break
        seconds = self._queue.end(credentials.episode)
        if isinstance(found, str):
            return HarnessOutcome(0.0, found, seconds)
        return HarnessOutcome(found, seconds=seconds)

    async def _ask(
        self, worker: WorkerProcess, credentials: Credentials, row: Row, url: str
    ) -> tuple[float | str, bool]:
        """Return the episode's return, or why there is none; and whether its process was lost."""
        asking = self._background.loop.create_task(worker.ask(([0], _batch(row, url, credentials))))
        try:
            is_late = await self._is_late(asking, credentials)
        finally:
            asking.cancel()
        if is_late:
            self.num_kills += 1
            self._crew.discard(worker)
            return (
                f"TimeoutError: the harness neither asked nor ended for {self._timeout_seconds:g} s "
                "(task.reward_timeout_seconds)"
            ), False
        try:
            reply = asking.result()
            output = read_reply(reply, [_NAME], 1)
            left = reply["left"]
        except (EOFError, OSError):
            self.num_kills += 1
            code = self._crew.discard(worker)
            if code is None:  # the fork server was killed, and with it every worker
                self._crew.forget_idle()
                return "the process that starts harnesses was killed", True
            return f"the harness ended its process ({ending(code)})", True
        except (ValueError, TypeError, KeyError) as error:
            self.num_kills += 1
            self._crew.discard(worker)
            return f"the harness broke its process ({type(error).__name__}: {error})", False
        if left is None:
            self._crew.release(worker)
        else:
            self._crew.retire(worker, left)
        (value,) = output.components[_NAME]
        return (_reason(output) if value is None else value), False

    async def _is_late(self, asking: "asyncio.Task[Any]", credentials: Credentials) -> bool:
        """Wait for a reply; return True as soon as the episode has been idle for too long before it."""
        while not asking.done():
            # While it waits for an answer, the earliest that it can be late is the limit from now.
            left = self._timeout_seconds - (self._queue.idle_seconds(credentials.episode) or 0.0)
            if left <= 0:
                return True
            await asyncio.wait({asking}, timeout=left)
        return False


def _reason(output: RewardOutput) -> str:
    # To the process, a harness is a reward.
    reason = output.first_failure or "no reason is known"
    return reason.replace(f"reward {_NAME!r}", "harness").replace("the reward", "the harness")


def _batch(row: Row | None, url: str, credentials: Credentials) -> RewardBatch:
    """Return an episode as what a reward is asked; no row: only the harness is looked at."""
    columns: dict[str, list[Any]] = {
        "row": [None if row is None else dict(row)],
        "url": [url],
        "key": [credentials.key],
        "model": [credentials.model],
    }
    return RewardBatch([""], [""], [[]], columns)
