"""Rank's side of harnesses: an endpoint, processes of harnesses that use it, and answers for them."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

from shardes.config.task import TaskConfig
from shardes.endpoint.desk import Desk, Seat
from shardes.endpoint.requests import SamplingSettings
from shardes.endpoint.server import EndpointServer
from shardes.environments.harness import HarnessSpec
from shardes.environments.harness_pool import HarnessOutcome, HarnessPool
from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.episode_results import EpisodeOutcome
from shardes.rollout.harness_cohort import (
    HarnessCohort,
    HarnessLimits,
    RequestTexts,
    TokenAnswer,
    TokenPrompt,
)
from shardes.tasks.base import ChatTemplate, Row
from shardes.utils.closing import Closing


class AnswerFunction(Protocol):
    """Answers the prompts of one turn of a cohort, in one micro-batch."""

    def __call__(self, prompts: Sequence[TokenPrompt], *, cohort: int) -> Sequence[TokenAnswer]:
        """Return the answers in the order of the prompts, of which there is at least one.

        Args:
            prompts: In the order of the episodes, and then of arrival.
            cohort: Number of the cohort; a function of the data alone.
        """


class HarnessPlayer(Closing):
    """Plays the episodes of a task with a harness: an endpoint, and processes that use it.

    Args:
        config: Harness and limits of its processes.
        sampling: How the run draws tokens.
        encoder: Turns texts and chats into tokens.
        chat: The template that chats go through.
        port: Port of the endpoint; 0: the kernel chooses one.
        num_lanes: Cohorts that are played at a time, which share the processes.

    Attributes:
        num_at_once: Episodes of a cohort at a time: the others begin, in order, as these end. If it is less
            than a cohort has, what is computed together, and so the last bits, depend on it.

    Raises:
        UserError: The harness cannot be used, or the port is in use.
    """

    def __init__(
        self,
        config: TaskConfig,
        *,
        sampling: SamplingSettings,
        encoder: PromptEncoder,
        chat: ChatTemplate,
        port: int = 0,
        num_lanes: int = 2,
    ) -> None:
        self.num_at_once = config.reward_workers // num_lanes
        if not self.num_at_once:
            raise UserError(
                f"task.reward_workers: got {config.reward_workers}, but a harness runs in a process for each "
                f"of its episodes, and {num_lanes} are played at a time at least; wanted {num_lanes} or more"
            )
        self._texts = RequestTexts(encoder, chat)
        self.desk = Desk()
        self._server = EndpointServer(self.desk, sampling, port=port)
        try:
            self._pool = HarnessPool(
                HarnessSpec.of(config.harness or config.environment or "", config.environment_arguments),
                self.desk,
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

    def close(self) -> None:
        """End all episodes, their processes, and the endpoint."""
        self.desk.close()
        self._pool.close()
        self._server.close()

    def begin(
        self, number: int, episodes: Mapping[int, Row], *, model: str, limits: HarnessLimits
    ) -> "HarnessCohort":
        """Begin a cohort, and return at once.

        Args:
            number: Which cohort it is.
            episodes: By index, in order, the row of each of its episodes.
            model: Name of the model that they ask.
            limits: Limits of what they may ask.
        """
        return HarnessCohort(
            number,
            episodes,
            model=model,
            limits=limits,
            desk=self.desk,
            texts=self._texts,
            start=self._start,
            num_at_once=self.num_at_once,
        )

    def _start(self, seat: Seat, row: Row) -> "Future[HarnessOutcome]":
        return self._pool.begin(seat, row, self._server.url_of(seat))


def play(
    player: HarnessPlayer,
    cohorts: Mapping[int, Mapping[int, Row]],
    answer: AnswerFunction,
    *,
    model: str,
    limits: HarnessLimits,
    take: Callable[[int, EpisodeOutcome], None],
    num_lanes: int = 2,
) -> None:
    """Play cohorts to their end, some of them in turn: the episodes of one go on while another is answered.

    Args:
        player: Plays them.
        cohorts: By number, the episodes of each; see ``HarnessPlayer.begin``.
        answer: Answers.
        model: Name of the model that is asked.
        limits: Limits of what episodes may ask.
        take: Takes in each episode that is over: its index, and its outcome.
        num_lanes: Cohorts at a time.
    """
    waiting = deque(cohorts.items())
    lanes: deque[HarnessCohort] = deque()
    try:
        while waiting or lanes:
            while waiting and len(lanes) < num_lanes:
                number, episodes = waiting.popleft()
                lanes.append(player.begin(number, episodes, model=model, limits=limits))
            cohort = lanes[0]
            prompts = cohort.advance()
            for index, outcome in cohort.outcomes().items():
                take(index, outcome)
            if prompts:
                cohort.answer(answer(prompts, cohort=cohort.number))
                lanes.rotate(-1)
            else:
                lanes.popleft()
    finally:
        for cohort in lanes:
            cohort.close()
