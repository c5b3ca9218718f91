"""Worker processes of a pool: started when answers wait, and replaced when they are of no more use."""

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from shardes.errors import UserError
from shardes.rewards.processes import ForkServer, WorkerProcess, ending
from shardes.tasks.base import Component

logger = logging.getLogger(__name__)

# How long the import of a reward may take.
IMPORT_SECONDS = 600.0
# How long answers wait for a worker before there are more of them.
PATIENCE_SECONDS = 0.5
# How often in a row the fork server is started again while no worker gets to the end of its import.
_MOST_RESTARTS = 3


class _LostServerError(UserError):
    """The fork server ended while a worker imported the rewards; another worker may have ended it."""


class Crew:
    """Workers, each of which judges one batch at a time.

    Its coroutines and methods run in one event loop.

    Args:
        components: The components that workers import, with references as functions.
        max_workers: Processes at most. There is one at first; more come when answers have to wait.
        start_fork_server: Starts the process that workers are forked from.
        background: Runs a coroutine in the event loop.

    Attributes:
        columns: Columns that each component looks at, once a worker has imported them; None: all.
        obstacle: Reason why workers see other processes than their own, once there is one; None if not.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        max_workers: int,
        start_fork_server: Callable[[], ForkServer],
        background: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._components = list(components)
        self._max_workers = max_workers
        self._background = background
        self._idle: list[WorkerProcess] = []
        self._waiting: collections.deque[asyncio.Future[WorkerProcess]] = collections.deque()
        # All workers, and those of them that are not ready yet.
        self._num_workers = self._num_starting = 0
        self._start_fork_server = start_fork_server
        self._fork_server = start_fork_server()
        self._num_restarts = 0
        self._has_told_of_left = False
        self.columns: list[list[str] | None] = [None] * len(components)
        self.obstacle: str | None = None

    async def start(self) -> None:
        """Start the first worker.

        Raises:
            UserError: A function does not exist, or importing it fails.
        """
        self._count_new()
        await self._start_worker()
        self.obstacle = self._fork_server.obstacle()

    def close(self) -> None:
        """End all processes."""
        self._fork_server.close()

    async def acquire(self) -> WorkerProcess:
        """Take an idle worker, or wait for one; a long wait starts further workers."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.reader.at_eof():
                return worker
            self.discard(worker)  # it has ended meanwhile, which is not the next call's fault
        place: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        if self._num_workers == 0:
            self.grow()
        else:
            asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self.grow)
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result())
            raise

    def release(self, worker: WorkerProcess) -> None:
        """Give a worker to whoever has waited longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(worker)
                return
        self._idle.append(worker)

    def grow(self) -> None:
        """Start a worker for everyone who waits, up to the limit."""
        num_wanted = sum(not place.done() for place in self._waiting) - self._num_starting
        for _ in range(min(num_wanted, self._max_workers - self._num_workers)):
            self._add_worker()

    def _add_worker(self) -> None:
        """Start a worker in the background."""
        self._count_new()
        self._background(self._add())

    async def _add(self) -> None:
        try:
            await self._start_worker()
        except (UserError, OSError, ValueError, KeyError) as error:
            if isinstance(error, _LostServerError) and self._num_restarts < _MOST_RESTARTS:
                self.grow()
            if self._num_workers:
                return
            for place in self._waiting:  # nobody else will come
                if not place.done():
                    place.set_exception(RuntimeError(f"no process for rewards can be started: {error}"))
            self._waiting.clear()

    def _count_new(self) -> None:
        """Count a worker that is about to be started; it counts from now, not from when that begins."""
        self._num_workers += 1
        self._num_starting += 1

    async def _start_worker(self) -> None:
        """Start a worker that has been counted, and have it import the rewards."""
        try:
            server, worker = await self._fork()
        except BaseException:
            self._num_workers -= 1
            self._num_starting -= 1
            raise
        is_lost = False
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                reply = await worker.ask(self._components)
                error = reply["error"]
                columns = reply["columns"] if error is None else self.columns
        except TimeoutError:
            error = f"importing it took longer than {IMPORT_SECONDS:g} s"
        except (EOFError, OSError):
            how, is_lost = "with its parent", True
            with contextlib.suppress(OSError):  # the fork server may have ended, too
                if server is self._fork_server:
                    how, is_lost = ending(server.kill(worker.pid)), False
            error = f"importing it ended the process ({how})"
        except BaseException:
            self._end(worker)
            raise
        finally:
            self._num_starting -= 1
        if error is not None:
            self._end(worker)
            raise (_LostServerError if is_lost else UserError)(f"task.reward: {error}")
        self._num_restarts = 0
        self.columns = columns
        self.release(worker)

    async def _fork(self) -> tuple[ForkServer, WorkerProcess]:
        """Fork a worker, and return it with its fork server; if that is gone, start another first."""
        try:
            pid, connection = self._fork_server.fork()
        except OSError:
            self._fork_server.close()
            self._num_restarts += 1
            self._fork_server = self._start_fork_server()
            pid, connection = self._fork_server.fork()
        server = self._fork_server
        return server, WorkerProcess(pid, *await asyncio.open_unix_connection(sock=connection))

    def discard(self, worker: WorkerProcess) -> int | None:
        """Kill a worker, replace it if somebody waits, and return its exit code (see ``kill``) if known."""
        code = self._end(worker)
        self.grow()
        return code

    def _end(self, worker: WorkerProcess) -> int | None:
        """Kill a worker, and return its exit code if known."""
        self._num_workers -= 1
        worker.writer.close()
        with contextlib.suppress(OSError):
            return self._fork_server.kill(worker.pid)
        return None

    def retire(self, worker: WorkerProcess, left: str) -> None:
        """Replace a worker in which a reward has left something behind that may disturb others."""
        if not self._has_told_of_left:
            self._has_told_of_left = True
            logger.warning(
                "a reward has left %.200s behind, so its process is replaced after such calls, and the "
                "reward imported again; to avoid that, end what a call starts, or start it at import",
                left,
            )
        self.discard(worker)
        if not self._idle and self._num_starting == 0 and self._num_workers < self._max_workers:
            self._add_worker()

    def forget_idle(self) -> None:
        """Let go of workers that nobody has."""
        for worker in self._idle:
            worker.writer.close()
        self._num_workers -= len(self._idle)
        self._idle.clear()
