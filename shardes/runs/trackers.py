"""Trackers: TensorBoard and Weights & Biases, which get the very lines of metrics.jsonl.

``log.report_to`` names entries of the registry ``TRACKERS``. The package of a tracker is optional, and is
imported only when a run begins that asks for it.
"""

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardes.errors import UserError
from shardes.utils.files import write_atomically
from shardes.utils.reading import read_regular

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""


class Tracker(Protocol):
    """Receiver of metrics, on rank 0.

    A failure of a tracker is a warning and not the end of the run, because metrics.jsonl has everything.
    """

    name: str

    def write(self, line: Line) -> None:
        """Take in one line; its iteration is the step."""

    def close(self) -> None:
        """Hand over what is buffered, and end."""


@dataclass(frozen=True)
class TrackedRun:
    """State of a run's directory before a job adds to its metrics.

    Attributes:
        path: The run directory.
        lines: The lines of metrics.jsonl.
        first_untold: The iteration after the last one of which a line was ever written, removed or not.
        config: The configuration, with JSON-able values.
    """

    path: Path
    lines: Sequence[Line]
    first_untold: int
    config: Mapping[str, Any]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing; imports nothing.

    Raises:
        UserError: The package of one is not installed.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        # A directory of that name, as W&B leaves one where it was started, looks like a package without code.
        if found is None or found.origin is None:
            raise UserError(
                f"log.report_to: {name} is not installed; pip install 'shardes[{name}]', or leave it out of "
                "log.report_to"
            )


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """Open the trackers that ``log.report_to`` names.

    A tracker that the run has not had so far gets all lines that there are, another one only new ones.

    Raises:
        UserError: A tracker cannot be used.
    """
    with ExitStack() as opened:
        trackers = [opened.enter_context(closing(TRACKERS[name](run))) for name in names]
        opened.pop_all()
    return trackers


def scalars(line: Line, *, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line by name, those in groups as ``seconds/rollout``; without the iteration."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, prefix=f"{prefix}{key}/")
        elif isinstance(value, int | float) and f"{prefix}{key}" != "iteration":
            found[f"{prefix}{key}"] = value
    return found


class TensorBoard:
    """Event files in the run directory.

    TensorBoard drops what it was told of steps from ``purge_step`` on. These are the iterations that a dead
    job had begun, and the line at the end of a run that now goes on.
    """

    name = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = run.path / "tensorboard"
        is_new = not any(directory.glob("events.out.tfevents.*"))
        try:
            self._writer = SummaryWriter(str(directory), purge_step=None if is_new else len(run.lines))
        except OSError as error:
            raise UserError(f"log.report_to: tensorboard: {directory} cannot be written ({error})") from None
        for line in run.lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        """Add the numbers of a line, and flush them."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["iteration"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B that a resumed job goes on with.

    W&B takes every step once. When a run that had ended goes on, the line at its end keeps its step.
    """

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        directory = run.path / "wandb"
        directory.mkdir(exist_ok=True)
        remembered = directory / "run-id"
        is_new = not remembered.exists()
        self._first = 0 if is_new else run.first_untold
        if is_new:
            write_atomically(remembered, uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "shardes"),
                name=run.path.resolve().name,
                id=read_regular(remembered, max_bytes=1000).decode().strip(),
                resume="allow",
                dir=str(run.path),
                config=dict(run.config),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except (wandb.Error, OSError) as error:
            if is_new:
                remembered.unlink()
            raise UserError(
                f"log.report_to: wandb cannot be used ({' '.join(str(error).split())}); log in (wandb "
                "login), set WANDB_MODE=offline to send it later, or leave it out of log.report_to"
            ) from None
        for line in run.lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        """Log the numbers of a line, unless an earlier job has."""
        if line["iteration"] >= self._first:
            self._run.log(scalars(line), step=line["iteration"])

    def close(self) -> None:
        """Finish the run of W&B."""
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    each.name: each for each in (TensorBoard, WeightsAndBiases)
}
"""Trackers by the name that ``log.report_to`` and their extra in pyproject.toml have."""
