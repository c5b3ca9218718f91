"""A time limit to steps of an engine: its ranks wait for each other without one."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from shardes.distributed.failure_monitor import end_process
from shardes.errors import EXIT_FAILURE
from shardes.utils.logs import tell_user

# Part of the limit between two looks at the clock, and seconds that it is at most.
_TICK_SHARE, _MOST_TICK_SECONDS = 0.1, 1.0


class StepLimit:
    """Context of a step, after which a thread ends this process if the step takes too long.

    A rank that waits inside a kernel cannot be interrupted otherwise. The other ranks end with this one.

    Args:
        seconds: Limit to a step.
        end: Function that ends the process with an exit status.
    """

    def __init__(self, seconds: float, *, end: Callable[[int], None] = end_process) -> None:
        self._seconds, self._end = seconds, end
        self._began: float | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self._began = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="step limit", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._began = None

    def _watch(self) -> None:
        tick = min(_MOST_TICK_SECONDS, self._seconds * _TICK_SHARE)
        while True:
            time.sleep(tick)
            began = self._began
            if began is not None and time.monotonic() - began > self._seconds:
                tell_user(
                    f"a step of vLLM has taken more than {self._seconds} s (parallel.timeout_seconds): "
                    "another rank or the device hangs. What the run has done is in its journal: go on with "
                    "the same command"
                )
                self._end(EXIT_FAILURE)
                return
