"""Environments that take their time, for tools/bench/episodes.py."""

import asyncio
import time


class Sleep:
    """Say a few letters after a while, and reward nothing in particular.

    Args:
        seconds: Time of a step.
        num_turns: Turns of an episode.
    """

    def __init__(self, seconds: float, num_turns: int) -> None:
        self._seconds, self._left = seconds, num_turns
        self._index = 0

    def reset(self, index: int) -> str:
        """Begin an episode."""
        self._index = index
        return "12 + 3 = " * (4 + index % 3)

    def step(self, completion: str) -> tuple[str, float, bool]:
        """Take a step."""
        time.sleep(self._seconds)
        return self._told(completion)

    def _told(self, completion: str) -> tuple[str, float, bool]:
        self._left -= 1
        return " 7 - 1", len(set(completion)) / 100, self._left == 0


class AsyncSleep(Sleep):
    """Do the same without keeping the process busy."""

    async def step(self, completion: str) -> tuple[str, float, bool]:  # type: ignore[override]
        """Take a step."""
        await asyncio.sleep(self._seconds)
        return self._told(completion)
