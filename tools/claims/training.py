"""What a method's training gives: places on the way, and what they had cost."""

import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardes.session import Session


@dataclass(frozen=True)
class Place:
    """Weights on the way, and what had been spent until then.

    Attributes:
        step: Number of updates.
        num_completions: Number of answers that were generated for training.
        num_tokens: Number of their tokens.
        core_seconds: Processor time of all threads of the process since training began, loading the model
            included, imports and saving not.
    """

    step: int
    num_completions: int
    num_tokens: int
    core_seconds: float


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        places: Places in order, the last one with all updates; the base model is not among them.
        restore: Function that brings a session to a place's weights; it is called for the places in order.
        peak_bytes: Most memory that the process has had.
        imported_bytes: Memory that it had before the model was loaded.
    """

    places: list[Place]
    restore: "Callable[[Session, Place], None]"
    peak_bytes: int
    imported_bytes: int


class Clock:
    """Processor time of this process, but for pauses."""

    def __init__(self) -> None:
        self._start = time.process_time()

    @property
    def seconds(self) -> float:
        """Return the core-seconds since the clock was made."""
        return time.process_time() - self._start

    @contextmanager
    def paused(self) -> "Iterator[None]":
        """Leave out what is done meanwhile."""
        start = time.process_time()
        yield
        self._start += time.process_time() - start


def peak_bytes() -> int:
    """Return the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_bytes() -> int:
    """Return the memory that this process has, in bytes; 0 where the kernel does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def due_steps(num_steps: int, num_evaluations: int) -> list[int]:
    """Return the numbers of steps after which the held-out problems are asked, about evenly spaced.

    Args:
        num_steps: Steps in all; the last one is always among them.
        num_evaluations: Number of evaluations that is wanted.
    """
    wanted = max(1, min(num_steps, num_evaluations))
    return sorted({round(num_steps * (i + 1) / wanted) for i in range(wanted)})
