"""Wall-clock time by named phases."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Sum of seconds by phase: ``with timer("update"): ...``.

    Times are the host's: work queued on an accelerator counts in the phase that waits for it.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the time inside the context and add it to phase ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        seconds = {name: round(value, 6) for name, value in sorted(self._seconds.items())}
        self._seconds.clear()
        return seconds
