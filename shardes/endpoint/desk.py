"""Desk between the programs that ask and the rank that answers, in lock-step."""

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
class Seat:
    """Place of an episode at the endpoint.

    Attributes:
        episode: The episode's name in URLs.
        key: Its API key.
        model: Name of the model that it asks.
    """

    episode: str
    key: str = field(repr=False)
    model: str


@dataclass(frozen=True, eq=False)
class Ask:
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
class _Sitting:
    """State of an episode at the desk.

    Attributes:
        since: When it was last up to the episode to go on; None while it waits.
        given: Answers that it has had.
        unclaimed: Answers to requests that were taken back, as the process had ended, say.
        replayed: Answers of before it was begun again, until it asks for them again.
    """

    seat: Seat
    since: float | None = None
    busy_seconds: float = 0.0
    num_asks: int = 0
    attempt: int = 0
    waiting: list[Ask] = field(default_factory=list)
    given: list[_Given] = field(default_factory=list)
    unclaimed: list[_Given] = field(default_factory=list)
    replayed: list[_Given] = field(default_factory=list)


class Desk:
    """Collects requests until every episode of a cohort waits for an answer or has ended.

    Its methods may be called in any thread. An answer that has been given is kept as long as its episode
    lasts: one that is begun again, since its process was killed, gets the same answers to the same requests.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._sittings: dict[str, _Sitting] = {}
        self._num_admitted = 0
        self._is_closed = False

    def admit(self, model: str) -> Seat:
        """Give a new episode a place; it counts as living from now on."""
        with self._change:
            seat = Seat(f"e{self._num_admitted}", secrets.token_urlsafe(24), model)
            self._num_admitted += 1
            self._sittings[seat.episode] = _Sitting(seat)
            return seat

    def begin(self, episode: str) -> None:
        """Say that an episode begins in a process; or begins again, with the answers that it has had."""
        with self._change:
            sitting = self._sittings.get(episode)
            if sitting is None:
                return
            sitting.since = time.monotonic()
            lost = sitting.waiting
            sitting.replayed = [*sitting.given, *sitting.unclaimed, *sitting.replayed]
            sitting.given, sitting.unclaimed, sitting.waiting = [], [], []
            sitting.num_asks, sitting.attempt = 0, sitting.attempt + 1
            self._change.notify_all()
        for ask in lost:
            ask.deliver(_closed())

    def end(self, episode: str) -> float:
        """Say that an episode is over; return the seconds in which it did not wait for answers."""
        with self._change:
            sitting = self._sittings.pop(episode, None)
            self._change.notify_all()
        if sitting is None:
            return 0.0
        for ask in sitting.waiting:
            ask.deliver(_closed())
        return sitting.busy_seconds + (0.0 if sitting.since is None else time.monotonic() - sitting.since)

    def close(self) -> None:
        """End all episodes, and refuse whatever is asked from now on."""
        with self._change:
            self._is_closed = True
            episodes = list(self._sittings)
        for episode in episodes:
            self.end(episode)

    def seat_of(self, episode: str, key: str) -> Seat | None:
        """Return the place of a living episode whose key this is."""
        with self._change:
            sitting = self._sittings.get(episode)
        expected = secrets.token_urlsafe(24) if sitting is None else sitting.seat.key
        is_right = hmac.compare_digest(expected.encode(), key.encode())
        return sitting.seat if is_right and sitting is not None else None

    def ask(self, episode: str, request: Request, body: Any, deliver: Deliver) -> Ask:
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
            sitting = self._sittings.get(episode)
            if sitting is None or self._is_closed:
                raise _closed()
            ask = Ask(episode, sitting.num_asks, request, deliver, digest, sitting.attempt)
            sitting.num_asks += 1
            known = next((i for i, (asked, _) in enumerate(sitting.replayed) if asked == digest), None)
            if known is None and sitting.replayed:
                raise ApiError(
                    "the episode was begun again, since its process was killed, and asks something else than "
                    "the first time, so that it cannot get the same answers; make the harness deterministic",
                    status=400,
                    code="replay_diverged",
                )
            if known is None:
                if not sitting.waiting and sitting.since is not None:
                    sitting.busy_seconds += time.monotonic() - sitting.since
                sitting.since = None
                sitting.waiting.append(ask)
                self._change.notify_all()
                return ask
            answered = sitting.replayed.pop(known)
            sitting.given.append(answered)
            sitting.since = time.monotonic()
        deliver(answered[1])
        return ask

    def withdraw(self, ask: Ask) -> None:
        """Take back a request whose asker has gone away."""
        with self._change:
            sitting = self._sittings.get(ask.episode)
            if sitting is not None and ask in sitting.waiting:
                self._remove(sitting, ask)

    def wait(self, episodes: Sequence[str], timeout_seconds: float | None = None) -> list[Ask] | None:
        """Wait until each episode waits for an answer, or has ended.

        Args:
            episodes: Names of a cohort's episodes, in order.
            timeout_seconds: How long to wait; None: as long as it takes.

        Returns:
            All requests of the cohort that wait, in the order of the episodes and then of arrival, none of
            them if all episodes have ended; None after the timeout.
        """

        def is_complete() -> bool:
            living = [self._sittings[each] for each in episodes if each in self._sittings]
            return all(sitting.waiting for sitting in living)

        with self._change:
            if not self._change.wait_for(is_complete, timeout_seconds):
                return None
            return [
                ask for each in episodes if each in self._sittings for ask in self._sittings[each].waiting
            ]

    def living(self, episodes: Sequence[str]) -> list[str]:
        """Return those episodes that are not over."""
        with self._change:
            return [episode for episode in episodes if episode in self._sittings]

    def answer(self, ask: Ask, reply: Reply | ApiError) -> None:
        """Answer a request; an episode that was begun again meanwhile gets the answer once it asks again."""
        with self._change:
            sitting = self._sittings.get(ask.episode)
            if sitting is None:
                return
            answered = (ask.digest, reply)
            recipient: Ask | None = ask
            if ask not in sitting.waiting:
                again = (each for each in sitting.waiting if each.digest == ask.digest)
                recipient = None if ask.attempt == sitting.attempt else next(again, None)
            if recipient is None:
                kept = sitting.unclaimed if ask.attempt == sitting.attempt else sitting.replayed
                kept.append(answered)
                return
            self._remove(sitting, recipient)
            sitting.given.append(answered)
        recipient.deliver(reply)

    def num_answers(self, episode: str) -> int:
        """Return how many answers an episode has had, those before it was begun again included."""
        with self._change:
            sitting = self._sittings.get(episode)
            if sitting is None:
                return 0
            return len(sitting.given) + len(sitting.unclaimed) + len(sitting.replayed)

    def idle_seconds(self, episode: str) -> float | None:
        """Return how long an episode has neither asked nor ended; None while it waits.

        Of one that is over this is infinite, as nobody waits for it any more.
        """
        with self._change:
            sitting = self._sittings.get(episode)
            if sitting is None:
                return math.inf
            return None if sitting.since is None else time.monotonic() - sitting.since

    @staticmethod
    def _remove(sitting: _Sitting, ask: Ask) -> None:
        sitting.waiting.remove(ask)
        if not sitting.waiting:
            sitting.since = time.monotonic()


def _closed() -> ApiError:
    return ApiError("the episode is over", status=410, code="episode_over")
