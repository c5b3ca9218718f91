"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, from the very lines of that file.

Both are optional packages, imported when a run begins that asks for them. A tracker that fails later is a
warning and no end of the run: metrics.jsonl has everything.
"""

import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from shardes.errors import UserError
from shardes.runs.directory import RunDirectory, read_lines


class Tracker(Protocol):
    """Takes in lines of metrics.jsonl."""

    name: str

    def write(self, line: Mapping[str, Any]) -> None:
        """One line; its iteration is the step."""

    def close(self) -> None:
        """Hands on what is not yet."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers whose package is missing; imports nothing.

    Raises:
        UserError: One is.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        # A directory of that name, as W&B leaves one where it was started, looks like a package without code.
        if found is None or found.origin is None:
            raise UserError(
                f"log.report_to: {name} is not installed; pip install 'shardes[{name}]', or leave it out of "
                "log.report_to"
            )


def open_trackers(names: Sequence[str], run: RunDirectory, *, config: Mapping[str, Any]) -> list[Tracker]:
    """What ``log.report_to`` names; used by rank 0 alone.

    A tracker that the run has not had so far is told all lines that there are. One that it had is told what
    is new.

    Args:
        names: The key's value.
        run: The open run directory, before anything is written to its metrics.
        config: What the run was told, for those who show it.

    Raises:
        UserError: A tracker cannot be used.
    """
    trackers: list[Tracker] = []
    try:
        for name in names:
            trackers.append(
                _TensorBoard(run) if name == "tensorboard" else _WeightsAndBiases(run, config=config)
            )
    except BaseException:
        for tracker in trackers:
            tracker.close()
        raise
    return trackers


def scalars(line: Mapping[str, Any], *, prefix: str = "") -> dict[str, float]:
    """The numbers of a line by name, those in groups as ``seconds/rollout``; not the iteration."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= scalars(value, prefix=f"{prefix}{key}/")
        elif isinstance(value, int | float) and f"{prefix}{key}" != "iteration":
            found[f"{prefix}{key}"] = value
    return found


class _TensorBoard:
    """Event files in the run directory.

    TensorBoard drops what it was told of steps from ``purge_step`` on. These are the iterations that a dead
    job had begun, and the line at the end of a run that now goes on.
    """

    name = "tensorboard"

    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = run.path / "tensorboard"
        is_new = not any(directory.glob("events.out.tfevents.*"))
        first = run.metrics.num_lines
        try:
            self._writer = SummaryWriter(str(directory), purge_step=None if is_new else first)
        except OSError as error:
            raise UserError(f"log.report_to: tensorboard: {directory} cannot be written ({error})") from None
        for line in read_lines(run.metrics.path) if is_new else ():
            self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["iteration"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of W&B that a resumed job goes on with.

    W&B takes every step once. When a run that had ended goes on, the line at its end keeps its step.
    """

    name = "wandb"

    def __init__(self, run: RunDirectory, *, config: Mapping[str, Any]) -> None:
        import wandb

        directory = run.path / "wandb"
        directory.mkdir(exist_ok=True)
        remembered = directory / "run-id"
        is_new = not remembered.exists()
        self._first = 0 if is_new else run.metrics.first_untold
        if is_new:
            remembered.write_text(uuid.uuid4().hex[:12])
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "shardes"),
                name=run.path.resolve().name,
                id=remembered.read_text().strip(),
                resume="allow",
                dir=str(run.path),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except (wandb.Error, OSError) as error:
            if is_new:
                remembered.unlink()
            raise UserError(
                f"log.report_to: wandb cannot be used ({' '.join(str(error).split())}); log in (wandb "
                "login), set WANDB_MODE=offline to send it later, or leave it out of log.report_to"
            ) from None
        for line in read_lines(run.metrics.path) if is_new else ():
            self.write(line)

    def write(self, line: Mapping[str, Any]) -> None:
        if line["iteration"] >= self._first:
            self._run.log(scalars(line), step=line["iteration"])

    def close(self) -> None:
        self._run.finish()
