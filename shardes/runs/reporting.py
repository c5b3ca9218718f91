"""Reports of a run while it goes on: metrics.jsonl, trackers, log lines, a progress bar and callbacks."""

import logging
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from shardes.config.schema import Config
from shardes.runs.directory import RunDirectory, read_lines
from shardes.runs.metrics import heldout_metrics, iteration_metrics
from shardes.runs.trackers import TrackedRun, Tracker, open_trackers
from shardes.utils.progress import duration
from shardes.utils.timers import PhaseTimer
from shardes.utils.units import shown_number

# Number of last iterations from which the time that is left is estimated; evaluations come every few.
_NUM_TIMED = 20

logger = logging.getLogger(__name__)

Callback = Callable[[dict[str, Any]], object]
"""A function of metrics, as docs/metrics.md names them."""


@dataclass(frozen=True)
class Callbacks:
    """Functions that get a run's metrics as it goes on; called on rank 0.

    Attributes:
        on_iteration: Functions that get every line of metrics.jsonl, that of the end included.
        on_evaluation: Functions that get the centre's held-out rewards, as soon as these are known.
    """

    on_iteration: Sequence[Callback] = ()
    on_evaluation: Sequence[Callback] = ()


class Reporter:
    """Reporter of a run on rank 0; the others' do nothing.

    Args:
        config: Configuration of the run.
        is_main: Whether this is rank 0.
        device: Device whose peak memory is reported.
        timer: Timer of the phases of an iteration.
        callbacks: Functions that get the metrics.
    """

    def __init__(
        self,
        config: Config,
        *,
        is_main: bool,
        device: torch.device,
        timer: PhaseTimer,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._config = config
        self._num_iterations = config.es.iterations
        self._is_main = is_main
        self._device = device
        self._timer = timer
        self._callbacks = callbacks or Callbacks()
        self._run: RunDirectory | None = None
        self._trackers: list[Tracker] = []
        self._bar: Any = None
        self._iteration_seconds: deque[float] = deque(maxlen=_NUM_TIMED)
        self._begun = self._asked = time.monotonic()
        self._num_members = self._num_done = self._num_tokens = 0
        self._tokens_per_second = 0.0

    def open(self, run: RunDirectory) -> None:
        """Take a run directory over, on rank 0, and open its trackers.

        Raises:
            UserError: One of ``log.report_to`` cannot be used.
        """
        self._run = run
        if names := self._config.log.report_to:
            tracked = TrackedRun(
                run.path,
                lines=read_lines(run.metrics.path),
                first_untold=run.metrics.first_untold,
                config=self._config.model_dump(mode="json"),
            )
            self._trackers = open_trackers(names, tracked)

    def catch_up(self) -> None:
        """Write lines that are missing: a job may die between its journal entry and its metrics line.

        Raises:
            StorageError: They cannot be written.
        """
        if self._run is not None:
            for iteration in range(self._run.metrics.num_lines, len(self._run.history.updates)):
                self._write(iteration_metrics(self._run.history, iteration))

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            self._try(tracker, tracker.close)
        self._trackers = []

    @contextmanager
    def bar(self, first: int) -> Iterator[None]:
        """Show a bar while iterations from ``first`` on are done, if there is a terminal."""
        self._begun = time.monotonic()
        with tqdm(
            total=self._num_iterations,
            initial=first,
            unit="iteration",
            disable=None if self._is_main else True,
        ) as self._bar:
            yield

    def begin_members(self, num_members: int, *, num_known: int) -> None:
        """Reset the bar's counts for an iteration; ``num_known`` members are known from an earlier job."""
        self._asked = time.monotonic()
        self._num_members, self._num_done, self._num_tokens = num_members, num_known, 0

    def end_member(self, num_tokens: int) -> None:
        """Count one more member, which generated ``num_tokens`` tokens."""
        self._num_done, self._num_tokens = self._num_done + 1, self._num_tokens + num_tokens
        self._tokens_per_second = self._num_tokens / max(time.monotonic() - self._asked, 1e-9)
        self._bar.set_postfix_str(
            f"{self._num_done}/{self._num_members} members, {self._tokens_per_second:.0f} tokens/s"
        )

    def end_evaluation(self, iteration: int) -> None:
        """Call back with the centre's held-out rewards."""
        if self._run is not None:
            self._call(self._callbacks.on_evaluation, self._line_of_centre(iteration))

    def end_iteration(self, iteration: int, measured: Mapping[str, Any]) -> None:
        """Write and log the line of an iteration, whose update has been applied.

        Args:
            iteration: Number of updates before it.
            measured: Further metrics of it, which are not in the journal.

        Raises:
            StorageError: It cannot be written.
        """
        now = time.monotonic()
        self._iteration_seconds.append(now - self._begun)
        self._begun = now
        if self._run is not None:
            line = iteration_metrics(self._run.history, iteration) | {
                "seconds": self._timer.take(),
                **measured,
                "peak_memory_bytes": peak_memory_bytes(self._device),
            }
            self._write(line)
            left = fmean(self._iteration_seconds) * (self._num_iterations - iteration - 1)
            logger.info(
                "iteration %d/%d: reward %s, std %s, %s%s, %.0f tokens/s, %s left",
                iteration,
                self._num_iterations,
                shown_number(line["reward_mean"]),
                shown_number(line["reward_std"]),
                _shown_heldout(line),
                duration(self._iteration_seconds[-1]),
                self._tokens_per_second,
                duration(left),
            )
            self._call(self._callbacks.on_iteration, line)
        self._bar.update()

    def finish(self, *, weights_digest: str) -> None:
        """Write the last line, after all iterations.

        Raises:
            StorageError: It cannot be written.
        """
        if self._run is None:
            return
        line = self._line_of_centre(self._num_iterations)
        line |= {"seconds": self._timer.take(), "weights_digest": weights_digest}
        self._write(line)
        logger.info(
            "finished after %d iterations: %s%s", self._num_iterations, _shown_heldout(line), self._run.path
        )
        self._call(self._callbacks.on_iteration, line)

    def _line_of_centre(self, iteration: int) -> dict[str, Any]:
        assert self._run is not None, "rank 0 has a run directory"
        return {"iteration": iteration, **heldout_metrics(self._run.history, iteration)}

    def _write(self, line: dict[str, Any]) -> None:
        assert self._run is not None, "rank 0 has a run directory"
        self._run.metrics.write(line)
        for tracker in self._trackers:
            self._try(tracker, lambda tracker=tracker: tracker.write(line))  # type: ignore[misc]

    def _try(self, tracker: Tracker, action: Callable[[], None]) -> None:
        """Call a tracker; drop it with a warning if it fails."""
        try:
            action()
        except Exception as error:
            self._trackers = [each for each in self._trackers if each is not tracker]
            logger.warning(
                "log.report_to: %s failed (%s: %s) and is told nothing more; metrics.jsonl has everything",
                tracker.name,
                type(error).__name__,
                error,
            )

    def _call(self, callbacks: Sequence[Callback], metrics: dict[str, Any]) -> None:
        for callback in callbacks:
            callback(metrics)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: of the accelerator if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _shown_heldout(line: dict[str, Any]) -> str:
    """Return the centre's rewards, if it was evaluated, for the log, followed by a comma."""
    rewards = {"held-out": line["heldout_reward"]} if "heldout_reward" in line else {}
    rewards |= {f"on {name}": part["reward"] for name, part in line.get("heldout_sets", {}).items()}
    return "".join(f"{name} {shown_number(reward)}, " for name, reward in rewards.items())
