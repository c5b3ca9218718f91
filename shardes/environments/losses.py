"""How many processes may be lost before an episode, or everything, has failed."""

import time
from dataclasses import dataclass

# Ends of processes during an episode's calls after which it has failed: all of them, if none is its fault for
# sure.
_MAX_ENDS, _MAX_KILLS = 3, 20
# Losses in a row, and for how long they must have gone on, until no process is believed to come about any
# more.
_MAX_IN_VAIN, _MIN_SECONDS = 30, 60.0


@dataclass
class Attempts:
    """Attempts at something that have failed since the last one that has not."""

    num_failed: int = 0
    since: float = 0.0

    def fail(self) -> bool:
        """Count a failed attempt; return True if there should be no more."""
        if self.num_failed == 0:
            self.since = time.monotonic()
        self.num_failed += 1
        return self.num_failed >= _MAX_IN_VAIN and time.monotonic() - self.since > _MIN_SECONDS

    def succeed(self) -> None:
        """Begin to count anew."""
        self.num_failed = 0


@dataclass
class Losses:
    """Losses of processes during an episode's calls since one was answered.

    Attributes:
        num_ends: Processes that have ended of themselves.
        num_kills: Processes that somebody may have killed.
        starts: Attempts to start a process for the episode alone.
    """

    num_ends: int = 0
    num_kills: int = 0

    def __post_init__(self) -> None:
        self.starts = Attempts()

    def lose(self, *, may_be_chance: bool) -> bool:
        """Count a process that has ended; return True if the episode has failed."""
        self.num_ends += not may_be_chance
        self.num_kills += may_be_chance
        return self.num_ends >= _MAX_ENDS or self.num_lost >= _MAX_KILLS

    @property
    def num_lost(self) -> int:
        """Return the number of processes lost."""
        return self.num_ends + self.num_kills
