"""Runners of the episodes of several tasks, which are made before the rank has threads and devices."""

from collections.abc import Mapping

from shardes.config.schema import Config
from shardes.environments.adapters.registry import HARNESSES
from shardes.environments.base import EnvironmentSpec, EpisodeRunner, HarnessSpec
from shardes.environments.loading import missing_columns
from shardes.environments.pool import make_environment_runner
from shardes.errors import UserError
from shardes.tasks.base import PlacedRow, Task
from shardes.utils.closing import Closing


class Environments(Closing):
    """Runners of the episodes of some tasks, one for each environment or harness.

    Args:
        config: Limits of the processes, and how tokens are drawn.
        tasks: Tasks by the key of their section, such as ``task`` or ``eval.sets.other``.

    Raises:
        UserError: An environment cannot be made, or a row lacks what its reset needs; the message names the
            key, or the row.
    """

    def __init__(self, config: Config, tasks: Mapping[str, Task]) -> None:
        self._runners: list[tuple[EnvironmentSpec | HarnessSpec, EpisodeRunner]] = []
        try:
            for key, task in tasks.items():
                if task.episodes is None:
                    continue
                if self.of(task) is None:
                    program = task.episodes.program
                    self._runners.append((program, _make(config, program, key=key)))
                _check_rows(task, self.of(task), key=key)
        except BaseException:
            self.close()
            raise

    def of(self, task: Task) -> EpisodeRunner | None:
        """Return the runner of a task's episodes; None if its problems are none."""
        program = None if task.episodes is None else task.episodes.program
        return next((runner for known, runner in self._runners if known == program), None)

    @property
    def num_kills(self) -> int:
        """Return how many processes of environments have ended before their time, so far."""
        return sum(runner.num_kills for _, runner in self._runners)

    def close(self) -> None:
        """End all episodes and processes."""
        for _, runner in self._runners:
            runner.close()


def _make(config: Config, program: EnvironmentSpec | HarnessSpec, *, key: str) -> EpisodeRunner:
    if isinstance(program, EnvironmentSpec):
        return make_environment_runner(config.task, program, key=key)
    key = f"{key}.environment" if program.reference in HARNESSES.values() else f"{key}.harness"
    try:
        # A server is needed, and installed, for harnesses alone.
        from shardes.endpoint.requests import SamplingSettings
        from shardes.environments.harness_runner import HarnessRunner
    except ImportError as error:
        raise UserError(
            f"{key}: the endpoint needs the package {error.name}; install it with: pip install "
            "'shardes[endpoint]'"
        ) from None
    sampling = SamplingSettings(config.rollout.temperature, config.rollout.top_p)
    return HarnessRunner(program, config.task, sampling=sampling, key=key)


def _check_rows(task: Task, runner: EpisodeRunner | None, *, key: str) -> None:
    """Refuse a row without a column that its environment needs.

    Raises:
        UserError: There is one; the message names it.
    """
    assert runner is not None
    for row in (*task.train, *task.heldout):
        if (problem := missing_columns(row, runner.required)) is not None:
            place = row.where if isinstance(row, PlacedRow) else f"{key}.data"
            raise UserError(f"{place}: {problem}; if another holds it, say so with {key}.columns")


def tasks_by_key(task: Task, heldout_sets: Mapping[str, Task]) -> dict[str, Task]:
    """Return a run's tasks by the keys of their sections."""
    return {"task": task} | {f"eval.sets.{name}": other for name, other in heldout_sets.items()}
