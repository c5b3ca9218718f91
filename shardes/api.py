"""Training from Python, in one process: ``from shardes import Trainer, TrainConfig``.

A facade over what the command line does. The run directory, the journal and the metrics are the same, so that
a run that was begun here is resumed, exported, verified and plotted by the commands, and the other way round.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardes.config.loading import parse_config, read_tree
from shardes.config.old_keys import apply_changes
from shardes.config.schema import Config, check_model_directory
from shardes.distributed.stop import Stop, Stopped
from shardes.errors import UserError
from shardes.rewards.pool import InProcessRewards, RewardProcessPool, make_reward_runner
from shardes.runs.directory import read_lines
from shardes.runs.trackers import check_trackers
from shardes.tasks.base import Component, RewardFunction, Row, Task, all_rewards
from shardes.tasks.loading import load_tasks
from shardes.utils.files import write_atomically

Callback = Callable[[dict[str, Any]], object]
"""Gets metrics, as docs/metrics.md names them; what it returns is ignored."""

# One process holds the whole model, whatever a file says.
_ONE_PROCESS = {"backend": "single", "shard_size": None, "deepspeed": None}


class TrainConfig:
    """What a run is told: the sections of a configuration file, as dictionaries.

    ``task`` may leave out what the ``Trainer`` is given: ``data``, ``heldout_data`` and ``reward``. Of
    ``parallel``, what spreads a model over ranks is ignored.

    Args:
        **sections: ``model``, ``run``, ``rollout``, ``es``, and any other section of
            docs/configuration.md, each with its keys.

    Attributes:
        run_dir: The run directory.
        has_named_task: Whether the task is a built-in one, whose prompts another reward may judge.

    Raises:
        UserError: A key or value is wrong; the message names it.
    """

    def __init__(self, **sections: dict[str, Any]) -> None:
        tree: dict[str, Any] = copy.deepcopy(sections)
        apply_changes(tree, source="TrainConfig")
        for name in ("parallel", "task"):
            if not isinstance(tree.setdefault(name, {}), dict):
                raise UserError(
                    f"TrainConfig: {name} is {tree[name]!r:.80}; wanted: a dictionary of its keys"
                )
        tree["parallel"] |= _ONE_PROCESS
        self._tree = tree
        # The Trainer may bring what is missing; all else is checked now.
        task = {"data": "data.jsonl"} | tree["task"]
        if not any(task.get(key) for key in ("name", "reward", "rewards")):
            task["reward"] = "given:later"
        checked = parse_config(tree | {"task": task}, source="TrainConfig")
        self.run_dir = checked.run.dir
        self.has_named_task = checked.task.name is not None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *overrides: str) -> "TrainConfig":
        """Reads a YAML file.

        Args:
            path: The file.
            *overrides: Keys that are changed, as on the command line: ``"es.sigma=0.002"``.

        Raises:
            UserError: The file cannot be read, or a key or value is wrong.
        """
        return cls(**read_tree(Path(path), list(overrides)))

    def resolve(self, task: Mapping[str, Any]) -> Config:
        """The configuration with keys of ``task`` changed.

        Raises:
            UserError: Something is missing.
        """
        return parse_config(self._tree | {"task": self._tree["task"] | task}, source="TrainConfig, Trainer")


@dataclass(frozen=True)
class TrainResult:
    """How far a run is.

    Attributes:
        run_dir: The run directory.
        metrics: The lines of metrics.jsonl, as docs/metrics.md explains them.
        is_finished: Whether all iterations are done; false if the run was stopped.
    """

    run_dir: Path
    metrics: list[dict[str, Any]]
    is_finished: bool

    @property
    def heldout_rewards(self) -> dict[int, float]:
        """Held-out rewards of the centre by the number of updates that it had had."""
        return {
            line["iteration"]: line["heldout_reward"]
            for line in self.metrics
            if line.get("heldout_reward") is not None
        }


class Trainer:
    """Trains in this process; for several, start the command line with a launcher.

    Args:
        config: What the run is told.
        data: The problems, a dictionary of columns each; None: ``task.data`` names a file. They are written
            into the run directory, so the run can be resumed and looked at without this program.
        heldout_data: Problems that are never trained on; None: as the configuration says.
        reward: ``f(prompts, completions, **columns) -> list[float | None]``. It is called in this process,
            where nothing ends one that hangs. A text, ``"file.py:function"``, or None for what the
            configuration says: rewards run in processes of their own, which are killed and replaced.
        on_iteration: Called with each line of metrics.jsonl; one function or several.
        on_evaluation: Called with what the centre earned on held-out problems, as soon as that is known.

    Attributes:
        config: The configuration, resolved.

    Raises:
        UserError: The configuration or the data cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        data: Iterable[Row] | None = None,
        heldout_data: Iterable[Row] | None = None,
        reward: RewardFunction | str | None = None,
        on_iteration: Callback | Sequence[Callback] = (),
        on_evaluation: Callback | Sequence[Callback] = (),
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"Trainer: it works in one process, and this is one of {os.environ['WORLD_SIZE']}; train on "
                "several with: torchrun ... -m shardes train --config FILE"
            )
        # Where rows go that are given here; the run directory is made when training begins.
        self._files: dict[Path, str] = {}
        changes: dict[str, Any] = {}
        for key, rows in (("data", data), ("heldout_data", heldout_data)):
            if rows is not None:
                text = _as_lines(rows, key)
                file = config.run_dir / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
                self._files[file] = text
                changes[key] = str(file)
        self._reward = reward if callable(reward) else None
        if reward is not None:
            path = _reference(reward)
            is_own = not config.has_named_task
            changes |= {"reward": path, "rewards": None} if is_own else {"rewards": [{"path": path}]}
        self.config = config.resolve(changes)
        self._on_iteration = _listed(on_iteration)
        self._on_evaluation = _listed(on_evaluation)
        self._stop = Stop()

    def train(self) -> TrainResult:
        """Trains, or goes on with the run that ``run.dir`` holds, until it is finished or stopped.

        Raises:
            UserError: Something cannot be used; whatever was recorded before is kept.
            StorageError: A file of the run cannot be written.
        """
        config, self._stop = self.config, Stop()
        check_model_directory(config.model.path)
        check_trackers(config.log.report_to)
        self._write_data()
        task, heldout_sets = self._load_tasks()
        is_finished = True
        with self._make_rewards([task, *heldout_sets.values()]) as rewards:
            from shardes.runs.reporting import Callbacks
            from shardes.session import open_session
            from shardes.trainer import make_training_loop
            from shardes.utils.logs import configure_logging

            if not logging.getLogger().handlers:
                configure_logging()
            callbacks = Callbacks(on_iteration=self._on_iteration, on_evaluation=self._on_evaluation)
            try:
                with open_session(config, stop=self._stop) as session:
                    make_training_loop(
                        session, task, rewards=rewards, heldout_sets=heldout_sets, callbacks=callbacks
                    ).train()
            except Stopped:
                is_finished = False
        return TrainResult(config.run.dir, read_lines(config.run.dir / "metrics.jsonl"), is_finished)

    def stop(self) -> None:
        """Ends the training that goes on, after the member that is being evaluated; for callbacks.

        ``train`` then returns, and goes on from there when it is called again.
        """
        self._stop.reason = "Trainer.stop"

    def export(self, out: str | os.PathLike[str], *, iteration: int | str | None = None) -> Path:
        """Writes weights of the run as a Hugging Face model directory.

        Args:
            out: A directory that does not exist, or is empty.
            iteration: After how many updates, or ``"best"`` by held-out reward; None: all.

        Returns:
            The directory.

        Raises:
            UserError: There is no such iteration, or ``out`` is taken.
            StorageError: The export cannot be written.
        """
        from shardes.export.from_run import export_run

        export_run(
            self.config.run.dir,
            Path(out),
            iteration=None if iteration is None else str(iteration),
            base=self.config.model.path,
        )
        return Path(out)

    def _write_data(self) -> None:
        for path, text in self._files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():  # its name has a hash of what it holds
                    write_atomically(path, text)
            except OSError as error:
                raise UserError(
                    f"run.dir: {path} cannot be written ({error.strerror}); give another"
                ) from None

    def _load_tasks(self) -> tuple[Task, dict[str, Task]]:
        task, heldout_sets = load_tasks(self.config)
        if self._reward is not None:
            (named,) = task.rewards
            task = replace(task, rewards=(Component(named.name, self._reward, takes_messages=True),))
        return task, heldout_sets

    def _make_rewards(
        self, tasks: Sequence[Task]
    ) -> AbstractContextManager[InProcessRewards | RewardProcessPool]:
        if self._reward is not None:
            return InProcessRewards(all_rewards(tasks))
        return make_reward_runner(self.config.task, tasks)


def _as_lines(rows: Iterable[Row], key: str) -> str:
    """Rows as JSONL."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{key}: row {number} is {row!r:.80}; wanted: a dictionary of columns, such as a prompt"
            )
        try:
            lines.append(json.dumps(dict(row), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{key}: row {number} cannot be written as JSON ({error}); make it of texts, numbers, lists "
                "and dictionaries"
            ) from None
    if not lines:
        raise UserError(f"{key}: there are no rows; give at least one problem")
    return "".join(f"{line}\n" for line in lines)


def _reference(reward: RewardFunction | str) -> str:
    """What the configuration says of a reward: where it is, or for a function where it was defined."""
    if isinstance(reward, str):
        return reward
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return f"{getattr(reward, '__module__', 'python')}:{name}"


def _listed(callbacks: Callback | Sequence[Callback]) -> list[Callback]:
    return [callbacks] if callable(callbacks) else list(callbacks)
