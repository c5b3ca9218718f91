"""Rank's side of harnesses: an endpoint, and the processes of harnesses that ask it."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from shardes.config.task import TaskConfig
from shardes.endpoint.request_queue import Credentials, RequestQueue
from shardes.endpoint.requests import SamplingSettings
from shardes.endpoint.server import EndpointServer
from shardes.environments.base import COHORTS_AT_ONCE, HarnessOutcome, HarnessSpec
from shardes.environments.harness_pool import HarnessPool
from shardes.errors import UserError
from shardes.utils.closing import Closing


class HarnessRunner(Closing):
    """Runner of episodes that ask by themselves; who plays them takes their requests from the queue.

    Args:
        spec: The harness.
        config: Limits of its processes.
        sampling: How the run draws tokens.
        key: Key of the configuration that names the harness, for messages.

    Attributes:
        queue: Where episodes ask, and are answered.
        num_at_once: Episodes of a cohort at a time: the others begin, in order, as these end. If it is less
            than a cohort has, what is computed together, and so the last bits, depend on it.
        tools: None: harnesses bring their own with each request.
        required: Nothing: a harness gets the whole row.

    Raises:
        UserError: The harness cannot be used, or the endpoint's packages are missing.
    """

    tools = None
    required: Sequence[str] = ()

    def __init__(
        self, spec: HarnessSpec, config: TaskConfig, *, sampling: SamplingSettings, key: str
    ) -> None:
        self.num_at_once = config.reward_workers // COHORTS_AT_ONCE
        if not self.num_at_once:
            raise UserError(
                f"task.reward_workers: got {config.reward_workers}, but a harness runs in a process for each "
                f"of its episodes, and {COHORTS_AT_ONCE} are played at a time at least; wanted "
                f"{COHORTS_AT_ONCE} or more"
            )
        self.queue = RequestQueue()
        self._server = EndpointServer(self.queue, sampling)
        try:
            self._pool = HarnessPool(
                spec,
                self.queue,
                key=key,
                timeout_seconds=config.reward_timeout_seconds,
                max_workers=config.reward_workers,
                memory_bytes=config.reward_memory_bytes,
                may_isolate=config.reward_isolation == "auto",
            )
        except BaseException:
            self._server.close()
            raise

    @property
    def num_kills(self) -> int:
        """Return how many processes of harnesses have ended before their time, so far."""
        return self._pool.num_kills

    def start(self, credentials: Credentials, row: Mapping[str, Any]) -> "Future[HarnessOutcome]":
        """Begin an episode at its place, and return at once."""
        return self._pool.begin(credentials, row, self._server.url_of(credentials))

    def close(self) -> None:
        """End all episodes, their processes, and the endpoint."""
        self.queue.close()
        self._pool.close()
        self._server.close()
