"""Account of the ranks that a job has lost, and of what that means for it."""

from collections.abc import Collection

from shardes.distributed.silence import Silence
from shardes.errors import EXIT_FAILURE


class Losses:
    """Ranks that failed, died or froze.

    Args:
        silence: Clock of the ranks' silence.
    """

    def __init__(self, silence: Silence) -> None:
        self._silence = silence
        self._first_failure: tuple[int, str] | None = None
        self._failed: set[int] = set()
        self._dead: set[int] = set()

    def fail(self, rank: int, *, status: int, text: str) -> None:
        """Note that a rank has failed with an exit status and a message; the first failure counts."""
        self._failed.add(rank)
        if self._first_failure is None:
            self._first_failure = status, text

    def die(self, rank: int) -> bool:
        """Note that a rank has ended; return whether it did so without a word."""
        if rank not in self._failed:
            self._dead.add(rank)
        return rank in self._dead

    def verdict(self, others: Collection[int]) -> tuple[int, str]:
        """Return the exit status of all ranks, and the message for the user.

        What other ranks do because one is frozen or dead explains nothing, so that comes first.

        Args:
            others: Ranks that are connected with this one.
        """
        if suspects := self._silence.suspects(others):
            return EXIT_FAILURE, self._silence.described(suspects)
        if self._dead or self._first_failure is None:
            ranks = ", ".join(map(str, sorted(self._dead)))
            return EXIT_FAILURE, (
                f"rank(s) {ranks} ended without a word, or cannot be reached: killed, out of memory (see the "
                "kernel's log), or the network or the machine is down. What the run has done is in its "
                "journal: go on with the same command"
            )
        status, text = self._first_failure
        doubtful = self._silence.doubtful(others)
        if doubtful and status == EXIT_FAILURE:
            text = f"{text.rstrip()}\nBefore that, {self._silence.described(doubtful)}"
        return status, text
