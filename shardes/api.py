"""Train from Python: ``from shardes import Trainer, TrainConfig``.

A facade over the code behind the command line. The run directory, the journal and the metrics are the same,
so a run that was begun here can be resumed, exported, verified and plotted by the commands, and vice versa.
A script that a launcher starts on several ranks is the same script.
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

from shardes.config.consent import check_consent
from shardes.config.loading import parse_config, read_tree
from shardes.config.old_keys import apply_changes
from shardes.config.schema import Config
from shardes.distributed.place import read_place
from shardes.distributed.stop import Stop, Stopped
from shardes.environments.runners import Environments, tasks_by_key
from shardes.errors import UserError
from shardes.models.hub import check_model
from shardes.rewards.pool import InProcessRewards, RewardProcessPool, make_reward_runner
from shardes.runs.directory import read_lines
from shardes.runs.trackers import check_trackers
from shardes.tasks.base import Component, RewardFunction, Row, Task, all_rewards
from shardes.tasks.loading import load_tasks
from shardes.utils.files import write_atomically

Callback = Callable[[dict[str, Any]], object]
"""Receives metrics by the names in docs/metrics.md; its return value is ignored."""

# A process that is alone holds the whole model, whatever a file says.
_ONE_PROCESS = {"backend": "single", "shard_size": None, "deepspeed": None}


# Keys of the task by any of which answers, or episodes, earn something.
_EARNING = ("name", "reward", "rewards", "environment", "tools", "harness")


class TrainConfig:
    """Configuration of a run: the sections of a configuration file, as dictionaries.

    ``task`` may leave out ``data``, ``heldout_data`` and ``reward``, which the ``Trainer`` can be given
    instead. ``parallel.backend``, ``parallel.shard_size`` and ``parallel.deepspeed`` are for several ranks,
    which a launcher starts: a process that is alone holds the whole model.

    Args:
        **sections: ``model``, ``run``, ``rollout``, ``es``, and any other section of
            docs/configuration.md, each with its keys.

    Attributes:
        run_dir: The run directory.
        has_named_task: True for a built-in task (``task.name``), whose prompts another reward may judge.

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
        self._tree = tree
        # The Trainer may bring what is missing; all else is checked now.
        task = {"data": "data.jsonl"} | tree["task"]
        if not any(task.get(key) for key in _EARNING):
            task["reward"] = "given:later"
        self._checked = parse_config(self._placed() | {"task": task}, source="TrainConfig")
        self.run_dir = self._checked.run.dir
        self.has_named_task = self._checked.task.name is not None

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *overrides: str, trust_remote_code: bool = False
    ) -> "TrainConfig":
        """Read a YAML file.

        Args:
            path: Path of the file.
            *overrides: Changes of keys, as on the command line: ``"es.sigma=0.002"``.
            trust_remote_code: Whether a file in a run directory may name code and the like: see
                docs/durability.md. Other files may anyway.

        Raises:
            UserError: The file cannot be read, a key or value is wrong, or it names what it may not.
        """
        config = cls(**read_tree(Path(path), list(overrides)))
        check_consent(config._checked, Path(path), list(overrides), is_trusted=trust_remote_code)
        return config

    def resolve(self, task: Mapping[str, Any]) -> Config:
        """Return the validated configuration, with some keys of ``task`` replaced.

        Args:
            task: Keys of the section ``task``, with their values.

        Raises:
            UserError: A required key is missing, or a value is wrong.
        """
        changed = {"task": self._tree["task"] | task}
        return parse_config(self._placed() | changed, source="TrainConfig, Trainer")

    def _placed(self) -> dict[str, Any]:
        """Return the sections for the place of this process: of several ranks, or alone."""
        alone = _ONE_PROCESS if read_place().world_size == 1 else {}
        return self._tree | {"parallel": self._tree["parallel"] | alone}


@dataclass(frozen=True)
class TrainResult:
    """State of a run when training returns.

    Attributes:
        run_dir: The run directory.
        metrics: Lines of metrics.jsonl, parsed, the same on every rank; docs/metrics.md explains them.
        is_finished: True if all iterations are done; False if the run was stopped.
    """

    run_dir: Path
    metrics: list[dict[str, Any]]
    is_finished: bool

    @property
    def heldout_rewards(self) -> dict[int, float]:
        """Return the held-out rewards of the centre, by the number of updates before the evaluation."""
        return {
            line["iteration"]: line["heldout_reward"]
            for line in self.metrics
            if line.get("heldout_reward") is not None
        }


class Trainer:
    """Trainer of a run, in one process or on the ranks that a launcher has started.

    On several ranks, each makes the same trainer and calls the same methods. A rank that fails ends all
    others.

    Args:
        config: Configuration of the run.
        data: Problems to train on, each a dictionary of columns; None: the file ``task.data``. They are
            written into the run directory, so the run can be resumed and inspected without this program.
        heldout_data: Problems that are never trained on; None: the file ``task.heldout_data``, if any.
        reward: Function ``f(prompts, completions, **columns) -> list[float | None]``, called in this process,
            where a call that hangs is not ended; or its location as text, ``"file.py:function"``; None: the
            rewards of the configuration. The latter two run in worker processes, which are killed and
            replaced when they hang.
        on_iteration: Function or functions called with each line of metrics.jsonl, on rank 0.
        on_evaluation: Function or functions called with the centre's held-out rewards, once they are known,
            on rank 0.

    Attributes:
        config: Validated configuration.
        is_main: Whether this is rank 0, which writes files and prints; True for a process that is alone.

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
        self.is_main = read_place().rank == 0  # refuses variables of a launcher that are half set
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
        """Train, or resume the run in ``run.dir``, until it is finished or stopped.

        Raises:
            UserError: The model, data, rewards or configuration cannot be used; records so far are kept.
            StorageError: A file of the run cannot be written.
        """
        config, self._stop = self.config, Stop()
        check_model(config.model)
        if self.is_main:  # whose metrics they are told
            check_trackers(config.log.report_to)
        self._write_data()
        task, heldout_sets = self._load_tasks()
        is_finished = True
        with (
            self._make_rewards([task, *heldout_sets.values()]) as rewards,
            Environments(config, tasks_by_key(task, heldout_sets)) as environments,
        ):
            from shardes.rollout.preparing import prepared_job
            from shardes.runs.reporting import Callbacks
            from shardes.session import open_session
            from shardes.trainer import make_training_loop
            from shardes.utils.logs import configure_logging

            if not logging.getLogger().handlers:
                configure_logging()
            callbacks = Callbacks(on_iteration=self._on_iteration, on_evaluation=self._on_evaluation)
            with prepared_job(config, task, heldout_sets, environments=environments, stop=self._stop) as job:
                tasks = job.tasks
                parts: dict[str, Any] = {"rewards": rewards, "environments": environments}
                parts |= {"heldout_sets": tasks.heldout_sets, "encoder": tasks.encoder}
                with open_session(job.config, stop=self._stop, world=job.world) as session:
                    loop = make_training_loop(session, tasks.task, callbacks=callbacks, **parts)
                    try:
                        loop.train()
                    except Stopped:
                        is_finished = False
                    # As rank 0 has them, when it has written the last one.
                    lines = session.mesh.world.broadcast_json(self._read_metrics())
        return TrainResult(config.run.dir, lines, is_finished)

    def _read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.config.run.dir / "metrics.jsonl") if self.is_main else []

    def stop(self) -> None:
        """End the current training after the member that is being evaluated; for use in callbacks.

        ``train`` then returns, and resumes from there when it is called again.
        """
        self._stop.reason = "Trainer.stop"

    def export(self, out: str | os.PathLike[str], *, iteration: int | str | None = None) -> Path:
        """Write weights of the run as a Hugging Face model directory.

        Args:
            out: A directory that does not exist, or is empty.
            iteration: Number of updates that are applied, or ``"best"`` for the best held-out reward; None:
                all updates.

        Returns:
            Path of the directory.

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
            backend=self.config.parallel.backend,
            is_trusted=self.config.model.trust_remote_code,
        )
        return Path(out)

    def _write_data(self) -> None:
        for path, text in self._files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():  # its name has a hash of what it holds
                    # Each rank writes the same, as not all may see one disk; none into the other's.
                    own = path.with_name(f"{path.name}.{read_place().rank}")
                    write_atomically(own, text)
                    own.replace(path)
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
    """Return rows as JSONL; ``key`` is the argument they were given by, for messages."""
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
    """Return the location of a reward, ``file:function``, as the configuration records it."""
    if isinstance(reward, str):
        return reward
    name = getattr(reward, "__qualname__", type(reward).__qualname__)
    return f"{getattr(reward, '__module__', 'python')}:{name}"


def _listed(callbacks: Callback | Sequence[Callback]) -> list[Callback]:
    return [callbacks] if callable(callbacks) else list(callbacks)
