"""Runner of episodes in worker processes; those that hang or die are replaced (see ``hosts.py``)."""

import asyncio
import logging
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from shardes.config.task import TaskConfig
from shardes.environments.base import EnvironmentSpec, Episode, Message, StepResult
from shardes.environments.hosted import Call
from shardes.environments.hosts import Hosts
from shardes.environments.in_process import InProcessEnvironments
from shardes.environments.loading import missing_columns
from shardes.environments.record import Record
from shardes.environments.starting import NoProcessError, SetUp
from shardes.errors import UserError
from shardes.rewards.processes import ForkServer
from shardes.utils.background import BackgroundLoop
from shardes.utils.closing import Closing

logger = logging.getLogger(__name__)

_SERVE = "shardes.environments.worker:serve"
# How long environments may take to close when the pool does.
_CLOSE_SECONDS = 1.0
# How often somebody who waits makes sure that there is somebody to wait for.
_CHECK_SECONDS = 1.0


def make_environment_runner(
    config: TaskConfig, spec: EnvironmentSpec, *, key: str = "task"
) -> "InProcessEnvironments | EnvironmentPool":
    """Make the runner of a task's episodes, as the configuration has it.

    Args:
        config: Limits of the processes.
        spec: What runs the episodes.
        key: Section of the configuration that has it, for messages.

    Raises:
        UserError: There is no such environment, or it cannot be imported.
    """
    try:
        if config.reward_workers == 0:
            return InProcessEnvironments(spec)
        return EnvironmentPool(
            spec,
            timeout_seconds=config.reward_timeout_seconds,
            max_workers=config.reward_workers,
            memory_bytes=config.reward_memory_bytes,
            may_isolate=config.reward_isolation == "auto",
        )
    except (ValueError, NoProcessError) as error:
        names_key = str(error).startswith("task.")
        message = str(error).removeprefix("task.")
        raise UserError(f"{key}.{message}" if names_key else f"{key}.environment: {message}") from None


class EnvironmentPool(Closing):
    """Runner of episodes in worker processes, several in each.

    Args:
        spec: What runs the episodes.
        timeout_seconds: Time limit of a reset or a step, from when it begins to run.
        max_workers: Processes at most. There is one at first; more come when calls have to wait.
        memory_bytes: Address space of a process; None: no limit.
        may_isolate: Has processes see only themselves, where the kernel allows it.

    Attributes:
        tools: JSON schemas of the tools that the model may call; None: no tools.
        required: Columns that a row must have.

    Raises:
        NoProcessError: There is no such environment, or it cannot be imported.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        *,
        timeout_seconds: float,
        max_workers: int,
        memory_bytes: int | None,
        may_isolate: bool = False,
    ) -> None:
        self._background = BackgroundLoop("environments")
        self._hosts = Hosts(
            spec,
            timeout_seconds=timeout_seconds,
            max_workers=max_workers,
            start_fork_server=partial(ForkServer, memory_bytes, may_isolate=may_isolate, serve=_SERVE),
            background=self._background.start,
        )
        self._background.loop.set_exception_handler(self._break_down)
        self._num_begun = 0
        try:
            setup, self._obstacle = self._background.run(self._start()).result()
        except BaseException:
            self.close()
            raise
        self._columns = setup.columns
        self.tools: Sequence[dict[str, Any]] | None = setup.tools
        self.required = setup.required
        self._has_told_of_isolation = False

    async def _start(self) -> tuple[SetUp, str | None]:
        return await self._hosts.start(), self._hosts.obstacle()

    def _break_down(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Fail all episodes after a mistake of this module's own, so that nobody waits for ever."""
        loop.default_exception_handler(context)
        self._hosts.close(f"the pool of environments broke down ({context.get('exception')!r})")

    @property
    def num_kills(self) -> int:
        """Return how many processes have ended, or were ended, before their time."""
        return self._hosts.num_kills

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Episode]:
        """Reset an environment for each row, and return at once."""
        self._tell_of_isolation()
        return [self._begin(row) for row in rows]

    def _begin(self, row: Mapping[str, Any]) -> Episode:
        self._num_begun += 1
        record = Record(self._num_begun)
        episode = PooledEpisode(self._hosts, self._background, record)
        columns = {k: v for k, v in row.items() if self._columns is None or k in self._columns}
        if (failure := missing_columns(row, self.required)) is None:
            try:
                episode.ask(("reset", pickle.dumps(columns)))
            except Exception as error:  # an object's own methods may raise anything
                failure = f"a column cannot be sent to it ({type(error).__name__}: {error})"
        if failure is not None:
            episode.fail(failure)
        return episode

    def _tell_of_isolation(self) -> None:
        # Not when the pool is made: that is before logs are set up.
        if not self._has_told_of_isolation:
            self._has_told_of_isolation = True
            obstacle = self._obstacle
            logger.info(
                "environments run in processes of their own, which %s",
                "see no others" if obstacle is None else f"see those of this machine ({obstacle})",
            )

    def close(self) -> None:
        """End all episodes and all processes."""
        if not self._background.is_running:
            return
        self._background.run(self._hosts.end_all(_CLOSE_SECONDS)).result()
        self._background.stop(self._hosts.close)
        self._hosts.close_processes()


class PooledEpisode:
    """Handle of an episode that a worker plays.

    Args:
        hosts: The workers.
        background: The loop that they are served in.
        record: What is kept of the episode.
    """

    def __init__(self, hosts: Hosts, background: BackgroundLoop, record: Record) -> None:
        self._hosts = hosts
        self._background = background
        self._record = record
        self._pending: Future[StepResult] = Future()
        self._is_closed = False

    def fail(self, failure: str) -> None:
        """Have the episode fail before anybody plays it."""
        self._record.is_over = True
        self._pending.set_result(StepResult(failure=failure))

    def ask(self, call: Call) -> None:
        """Have a call answered, whose outcome ``wait`` returns."""
        pending: Future[StepResult] = Future()
        self._pending = pending
        self._background.call(lambda: self._hosts.ask(self._record, call, pending))

    def step(self, completion: str, *, message: Message | None = None) -> None:
        """Send on what the model has said, and return at once."""
        self.ask(("step", completion, message))

    def finish(self) -> None:
        """Say that there will be no more steps."""
        self.ask(("finish",))

    def wait(self) -> StepResult:
        """Wait for the outcome of the last call."""
        while True:
            try:
                return self._pending.result(_CHECK_SECONDS)
            except TimeoutError:
                if not self._background.is_running:
                    return StepResult(failure="the environments were closed")

    def close(self) -> None:
        """Give the episode up."""
        if not self._is_closed:
            self._is_closed = True
            self._background.call(lambda: self._hosts.end(self._record))
