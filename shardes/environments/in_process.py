"""Runner of episodes in this process; nothing stops an environment that hangs."""

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shardes.environments.answers import Answer, read_answer
from shardes.environments.base import EnvironmentSpec, Episode, Message, StepResult
from shardes.environments.hosted import Call, HostedEpisode
from shardes.environments.loading import EnvironmentFactory, make_factory, missing_columns
from shardes.utils.closing import Closing


class InProcessEnvironments(Closing):
    """Runner of episodes in this process.

    Args:
        spec: What runs them.

    Attributes:
        tools: JSON schemas of the tools that the model may call; None: no tools.
        required: Columns that a row must have.
        num_kills: 0: there are no processes to end.

    Raises:
        ValueError: There is no such environment, or it cannot be imported.
    """

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._factory = make_factory(spec)
        self._loop = _Loop()
        self._episodes: set[InProcessEpisode] = set()
        self.tools: Sequence[dict[str, Any]] | None = self._factory.tools
        self.required = self._factory.required
        self.num_kills = 0

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Episode]:
        """Reset an environment for each row; coroutines go on while somebody waits for an episode."""
        episodes = [InProcessEpisode(self._factory, self._loop, row) for row in rows]
        self._episodes = {episode for episode in self._episodes if not episode.is_closed} | set(episodes)
        return list(episodes)

    def close(self) -> None:
        """End all episodes."""
        for episode in self._episodes:
            episode.close()
        self._episodes.clear()
        self._loop.close()


class InProcessEpisode:
    """Handle of an episode in this process.

    Args:
        factory: Maker of its environment.
        loop: The loop that runs coroutines.
        row: Its row, of which it gets a copy.

    Attributes:
        is_closed: True once the environment has been closed.
    """

    def __init__(self, factory: EnvironmentFactory, loop: "_Loop", row: Mapping[str, Any]) -> None:
        self._episode = HostedEpisode(factory)
        self._loop = loop
        self._found: Answer | asyncio.Task[Answer] = {}
        self._result: StepResult | None = None
        self._is_over = self.is_closed = False
        columns = {k: v for k, v in row.items() if factory.columns is None or k in factory.columns}
        if (failure := missing_columns(row, factory.required)) is None:
            try:
                columns = copy.deepcopy(columns)
            except Exception as error:  # an object's own methods may raise anything
                failure = f"a column cannot be copied for it ({type(error).__name__}: {error})"
        if failure is None:
            self._call(("reset", columns))
        else:
            self._found, self._is_over = {"failure": failure, "seconds": 0.0}, True

    def _call(self, call: Call) -> None:
        self._result = None
        if self._is_over or self.is_closed:
            self._found = {"failure": "the episode is over", "seconds": 0.0}
            return
        found = self._episode.call(call)
        self._found = found if isinstance(found, dict) else self._loop.start(found)

    def step(self, completion: str, *, message: Message | None = None) -> None:
        """Have the environment take in what the model has said."""
        self._call(("step", completion, message))

    def finish(self) -> None:
        """Say that there will be no more steps."""
        self._call(("finish",))

    def wait(self) -> StepResult:
        """Return the outcome of the last call."""
        if self._result is None:
            found = self._found if isinstance(self._found, dict) else self._loop.wait(self._found)
            self._result = read_answer(found)
            self._is_over |= self._result.is_done or self._result.failure is not None
        return self._result

    def close(self) -> None:
        """Give the episode up."""
        if self.is_closed:
            return
        if isinstance(self._found, asyncio.Task):
            self._found.cancel()
        self.is_closed = True
        found = self._episode.call(("close",))
        if not isinstance(found, dict):
            self._loop.wait(self._loop.start(found))


class _Loop:
    """Event loop that runs while somebody waits; also where another one runs, as in a notebook."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread: ThreadPoolExecutor | None = None

    def start(self, answer: Awaitable[Answer]) -> "asyncio.Task[Answer]":
        return self._loop.create_task(_awaiting(answer))

    def wait(self, task: "asyncio.Task[Answer]") -> Answer:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="environments")
        if self._thread is not None:
            return self._thread.submit(self._loop.run_until_complete, task).result()
        return self._loop.run_until_complete(task)

    def close(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        if not self._loop.is_closed():
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()


async def _awaiting(answer: Awaitable[Answer]) -> Answer:
    return await answer
