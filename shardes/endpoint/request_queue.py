"""Queue of requests between the programs that ask and the rank that answers, in lock-step."""

import hashlib
import hmac
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardes.endpoint.errors import ApiError
from shardes.endpoint.requests import Request
from shardes.endpoint.responses import Reply

ANY_MODEL = "shardes"
"""Name by which every episode may call its model."""

Deliver = Callable[[Reply | ApiError], None]

_Given = tuple[bytes, Reply | ApiError]
"""A request, by its hash, and what it was answered."""


@dataclass(frozen=True)
class Credentials:
    """Credentials of an episode at the endpoint.

    Attributes:
        episode: The episode's name in URLs.
        key: Its API key.
        model: Name of the model that it asks.
    """

    episode: str
    key: str = field(repr=False)
    model: str


@dataclass(frozen=True, eq=False)
class PendingRequest:
    """Request that waits for its answer.

    Attributes:
        episode: Name of the episode that asks.
        number: Number of requests of the episode before it.
        request: What is asked.
        deliver: Is called with the answer.
        digest: Hash of the request, by which it is known again.
        attempt: How often the episode had been begun.
    """

    episode: str
    number: int
    request: Request
    deliver: Deliver = field(repr=False)
    digest: bytes = field(repr=False)
    attempt: int = 1


@dataclass
class _EpisodeState:
    """State of an episode at the endpoint.

    Attributes:
        since: When it was last up to the episode to go on; None while it waits.
        given: Answers that it has had.
        unclaimed: Answers to requests that were taken back, as the process had ended, say.
        replayed: Answers of before it was begun again, until it asks for them again.
    """

    credentials: Credentials
    since: float | None = None
    busy_seconds: float = 0.0
    num_asks: int = 0
    attempt: int = 0
    waiting: list[PendingRequest] = field(default_factory=list)
    given: list[_Given] = field(default_factory=list)
    unclaimed: list[_Given] = field(default_factory=list)
    replayed: list[_Given] = field(default_factory=list)


class RequestQueue:
    """Collects requests until every episode of a cohort waits for an answer or has ended.

    Its methods may be called in any thread. An answer that has been given is kept as long as its episode
    lasts: one that is begun again, since its process was killed, gets the same answers to the same requests.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._states: dict[str, _EpisodeState] = {}
        self._num_admitted = 0
        self._is_closed = False

    def admit(self, model: str) -> Credentials:
        """Give a new episode a place; it counts as living from now on."""
        with self._change:
            credentials = Credentials(f"e{self._num_admitted}", secrets.token_urlsafe(24), model)
            self._num_admitted += 1
            self._states[credentials.episode] = _EpisodeState(credentials)
            return credentials

    def begin(self, episode: str) -> None:
        """Say that an episode begins in a process; or begins again, with the answers that it has had."""
        with self._change:
            state = self._states.get(episode)
            if state is None:
                return
            state.since = time.monotonic()
            lost = state.waiting
            state.replayed = [*state.given, *state.unclaimed, *state.replayed]
            state.given, state.unclaimed, state.waiting = [], [], []
            state.num_asks, state.attempt = 0, state.attempt + 1
            self._change.notify_all()
        for ask in lost:
            ask.deliver(_closed())

    def end(self, episode: str) -> float:
        """Say that an episode is over; return the seconds in which it did not wait for answers."""
        with self._change:
            state = self._states.pop(episode, None)
            self._change.notify_all()
        if state is None:
            return 0.0
        for ask in state.waiting:
            ask.deliver(_closed())
        return state.busy_seconds + (0.0 if state.since is None else time.monotonic() - state.since)

    def close(self) -> None:
        """End all episodes, and refuse whatever is asked from now on."""
        with self._change:
            self._is_closed = True
            episodes = list(self._states)
        for episode in episodes:
            self.end(episode)

    def seat_of(self, episode: str, key: str) -> Credentials | None:
        """Return the place of a living episode whose key this is."""
        with self._change:
            state = self._states.get(episode)
        expected = secrets.token_urlsafe(24) if state is None else state.credentials.key
        is_right = hmac.compare_digest(expected.encode(), key.encode())
        return state.credentials if is_right and state is not None else None

    def ask(self, episode: str, request: Request, body: Any, deliver: Deliver) -> PendingRequest:
        """Hand in a request.

        Args:
            episode: Name of the episode that asks.
            request: What is asked.
            body: The same as it came, by which it is known again.
            deliver: Is called once with the answer or the refusal, in any thread, maybe before this returns.

        Raises:
            ApiError: The episode is over, or was begun again and does not ask what it has asked before.
        """
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        with self._change:
            state = self._states.get(episode)
            if state is None or self._is_closed:
                raise _closed()
            ask = PendingRequest(episode, state.num_asks, request, deliver, digest, state.attempt)
            state.num_asks += 1
            known = next((i for i, (asked, _) in enumerate(state.replayed) if asked == digest), None)
            if known is None and state.replayed:
                raise ApiError(
                    "the episode was begun again, since its process was killed, and asks something else than "
                    "the first time, so that it cannot get the same answers; make the harness deterministic",
                    status=400,
                    code="replay_diverged",
                )
            if known is None:
                if not state.waiting and state.since is not None:
                    state.busy_seconds += time.monotonic() - state.since
                state.since = None
                state.waiting.append(ask)
                self._change.notify_all()
                return ask
            answered = state.replayed.pop(known)
            state.given.append(answered)
            state.since = time.monotonic()
        deliver(answered[1])
        return ask

    def withdraw(self, ask: PendingRequest) -> None:
        """Take back a request whose asker has gone away."""
        with self._change:
            state = self._states.get(ask.episode)
            if state is not None and ask in state.waiting:
                self._remove(state, ask)

    def wait(
        self, episodes: Sequence[str], timeout_seconds: float | None = None
    ) -> list[PendingRequest] | None:
        """Wait until each episode waits for an answer, or has ended.

        Args:
            episodes: Names of a cohort's episodes, in order.
            timeout_seconds: How long to wait; None: as long as it takes.

        Returns:
            All requests of the cohort that wait, in the order of the episodes and then of arrival, none of
            them if all episodes have ended; None after the timeout.
        """

        def is_complete() -> bool:
            living = [self._states[each] for each in episodes if each in self._states]
            return all(state.waiting for state in living)

        with self._change:
            if not self._change.wait_for(is_complete, timeout_seconds):
                return None
            return [ask for each in episodes if each in self._states for ask in self._states[each].waiting]

    def living(self, episodes: Sequence[str]) -> list[str]:
        """Return those episodes that are not over."""
        with self._change:
            return [episode for episode in episodes if episode in self._states]

    def answer(self, ask: PendingRequest, reply: Reply | ApiError) -> None:
        """Answer a request; an episode that was begun again meanwhile gets the answer once it asks again."""
        with self._change:
            state = self._states.get(ask.episode)
            if state is None:
                return
            answered = (ask.digest, reply)
            recipient: PendingRequest | None = ask
            if ask not in state.waiting:
                again = (each for each in state.waiting if each.digest == ask.digest)
                recipient = None if ask.attempt == state.attempt else next(again, None)
            if recipient is None:
                kept = state.unclaimed if ask.attempt == state.attempt else state.replayed
                kept.append(answered)
                return
            self._remove(state, recipient)
            state.given.append(answered)
        recipient.deliver(reply)

    def num_answers(self, episode: str) -> int:
        """Return how many answers an episode has had, those before it was begun again included."""
        with self._change:
            state = self._states.get(episode)
            if state is None:
                return 0
            return len(state.given) + len(state.unclaimed) + len(state.replayed)

    def idle_seconds(self, episode: str) -> float | None:
        """Return how long an episode has neither asked nor ended; None while it waits.

        Of one that is over this is infinite, as nobody waits for it any more.
        """
        with self._change:
            state = self._states.get(episode)
            if state is None:
                return math.inf
            return None if state.since is None else time.monotonic() - state.since

    @staticmethod
    def _remove(state: _EpisodeState, ask: PendingRequest) -> None:
        state.waiting.remove(ask)
        if not state.waiting:
            state.since = time.monotonic()


def _closed() -> ApiError:
    return ApiError("the episode is over", status=410, code="episode_over")
