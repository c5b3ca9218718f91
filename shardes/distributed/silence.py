"""The time for which other ranks have given no sign of life."""

import time
from collections.abc import Callable, Iterable

# The most that counts of the time between two looks. This process may have been frozen itself, or busy: then
# what the others sent is there, and only has not been read yet.
_MOST_AWAY_SECONDS = 2.0
# A process may keep its interpreter from other threads for a few seconds, when it loads a library, say.
_LEAST_SECONDS = 10.0
# Interval of signs of life, at most, and how many must be missed before a silence is worth a word.
_BEAT_SECONDS = 5.0
_BEATS_MISSED = 3
# The part of a rank's wait for another after which the silence of a third is the reason for it.
_MOST_OF_A_WAIT = 0.7


class Silence:
    """Clock of the silence of other ranks; it stands still while this process does not run.

    Args:
        timeout_seconds: Most seconds that a rank waits for another.
        clock: Function that returns seconds.

    Attributes:
        beat_seconds: Interval at which a rank gives a sign of life.
    """

    def __init__(self, timeout_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed_seconds = max(_LEAST_SECONDS, timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._last_look = clock()
        self._awake = 0.0
        self._heard: dict[int, float] = {}
        self.beat_seconds = min(_BEAT_SECONDS, timeout_seconds / 8)

    def look(self) -> None:
        """Let the time pass until now; what has arrived must have been read before."""
        now = self._clock()
        self._awake += min(now - self._last_look, _MOST_AWAY_SECONDS)
        self._last_look = now

    def heard(self, rank: int) -> None:
        """Note a sign of life of a rank."""
        self._heard[rank] = self._awake

    def seconds(self, rank: int) -> float:
        """Return how long a rank has been silent; 0 if it was never heard of."""
        return self._awake - self._heard.get(rank, self._awake)

    def frozen(self, ranks: Iterable[int]) -> list[int]:
        """Return those of some ranks that have been silent for longer than a rank waits for another."""
        return [rank for rank in ranks if self.seconds(rank) >= self._allowed_seconds]

    def suspects(self, ranks: Iterable[int]) -> list[int]:
        """Return those of some ranks whose silence explains why another has waited for too long."""
        least = max(_MOST_AWAY_SECONDS, _MOST_OF_A_WAIT * self._timeout_seconds)
        return [rank for rank in ranks if self.seconds(rank) >= least]

    def doubtful(self, ranks: Iterable[int]) -> list[int]:
        """Return those of some ranks that have missed several signs of life."""
        return [rank for rank in ranks if self.seconds(rank) > _BEATS_MISSED * self.beat_seconds]

    def described(self, ranks: Iterable[int]) -> str:
        """Say which ranks have been silent for how long, and what to do."""
        ranks = sorted(ranks)
        seconds = max(self.seconds(rank) for rank in ranks)
        return (
            f"rank(s) {', '.join(map(str, ranks))} gave no sign of life for {seconds:.0f} s "
            f"(parallel.timeout_seconds: {self._timeout_seconds:g}): the process is frozen (stopped by a "
            "signal, say, or swapped out), or its machine is paused. What the run has done is in its "
            "journal: end what is left of these ranks, and go on with the same command"
        )
