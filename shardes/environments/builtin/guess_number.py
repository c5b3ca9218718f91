"""Guess the number: a whole number of a range is sought; after each guess, it is higher or lower.

The reward comes at the end and is all or nothing: 1 if the number is guessed in the guesses allowed. A row is
``{"index": i}``; its range and its number are functions of the index alone.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Puzzle:
    """A number to guess, and the range that it is said to be in: from ``low`` to ``high``, both included."""

    low: int
    high: int
    secret: int


def make_puzzle(index: int, *, numbers: Sequence[int], sizes: Sequence[int]) -> Puzzle:
    """Return the puzzle of an index.

    All ranges come once before any comes again, so disjoint parts of the indices from 0 to
    ``num_ranges(...)`` have no range in common.

    Args:
        index: Index of the row, from 0.
        numbers: Least and largest number of all ranges.
        sizes: Least and largest number of numbers in a range.
    """
    ranges = _ranges((numbers[0], numbers[1]), (sizes[0], sizes[1]))
    low, high = ranges[index % len(ranges)]
    digest = hashlib.sha256(f"secret {index}".encode()).digest()
    return Puzzle(low, high, low + int.from_bytes(digest[:8]) % (high - low + 1))


def num_ranges(*, numbers: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the number of different ranges."""
    return len(_ranges((numbers[0], numbers[1]), (sizes[0], sizes[1])))


@lru_cache
def _ranges(numbers: tuple[int, int], sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """Return all ranges, in an order that looks random and depends on no generator."""
    least, largest = numbers
    ranges = [
        (low, low + size - 1)
        for size in range(sizes[0], sizes[1] + 1)
        for low in range(least, largest - size + 2)
    ]
    return sorted(ranges, key=lambda ends: hashlib.sha256(f"range {ends}".encode()).digest())


class GuessNumber:
    """Environment of one puzzle.

    Args:
        numbers: Least and largest number of all ranges.
        sizes: Least and largest number of numbers in a range; None: always the range of all ``numbers``.
        guesses: Guesses allowed.
        brief: Say no more than ``10-59``, ``higher`` and ``lower``, for models of a few thousand parameters.

    Raises:
        ValueError: There is no such range, or no guess.
    """

    def __init__(
        self,
        numbers: Sequence[int] = (1, 100),
        sizes: Sequence[int] | None = None,
        guesses: int = 7,
        brief: bool = False,
    ) -> None:
        for name, ends in ("numbers", numbers), ("sizes", sizes):
            if ends is not None and not (len(ends) == 2 and ends[0] <= ends[1]):
                raise ValueError(f"{name} must be a least and a largest number; got {list(ends)}")
        count = numbers[1] - numbers[0] + 1
        self._numbers, self._sizes = numbers, (count, count) if sizes is None else sizes
        if not 1 <= self._sizes[0] <= self._sizes[1] <= count:
            raise ValueError(f"sizes must be from 1 to {count}, the size of numbers; got {list(self._sizes)}")
        if guesses < 1:
            raise ValueError(f"guesses must be at least 1; got {guesses}")
        self._guesses, self._brief = guesses, brief
        self._num_guesses = 0
        self.numbers = {"success": 0.0, "unread": 0.0}

    def reset(self, index: int) -> str:
        """Say in which range the number is."""
        self._puzzle = make_puzzle(index, numbers=self._numbers, sizes=self._sizes)
        low, high = self._puzzle.low, self._puzzle.high
        if self._brief:
            return f"{low}-{high}"
        return (
            f"I have chosen a whole number from {low} to {high}. Guess it in at most {self._guesses} "
            'guesses. After each guess I say "higher" if my number is higher than yours, or "lower" if it is '
            "lower. You may think before you guess; the last number that you write is your guess."
        )

    def step(self, completion: str) -> tuple[str, float, bool]:
        """Compare the last number of the completion with the one sought."""
        found = _NUMBER.findall(completion)
        self._num_guesses += 1
        if found and int(found[-1]) == self._puzzle.secret:
            self.numbers["success"] = 1.0
            return "", 1.0, True
        if self._num_guesses == self._guesses:
            return "", 0.0, True
        if not found:
            self.numbers["unread"] += 1
            answer = "?" if self._brief else "There is no number in what you wrote"
        else:
            answer = "higher" if self._puzzle.secret > int(found[-1]) else "lower"
        left = self._guesses - self._num_guesses
        return (answer if self._brief else f"{answer}. Guesses left: {left}."), 0.0, False
