"""The command ``shardes compare``; nothing heavy is imported before the configuration is checked."""

import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardes.distributed.place import read_place
from shardes.distributed.stop import Stop
from shardes.environments.base import HarnessSpec
from shardes.environments.runners import Environments, tasks_by_key
from shardes.errors import StorageError, UserError
from shardes.evaluation.drawing import Drawing
from shardes.evaluation.model_ref import ModelRef, resolve_models
from shardes.models.hub import check_model
from shardes.monitor.commands import TRUST
from shardes.monitor.pictures import check_picture
from shardes.rewards.pool import make_reward_runner
from shardes.tasks.base import Task
from shardes.tasks.loading import load_tasks
from shardes.utils.files import write_atomically

if TYPE_CHECKING:
    from shardes.distributed.group import Group
    from shardes.evaluation.measuring import Comparison, ModelResult
    from shardes.rollout.preparing import PreparedTasks

_PATH = click.Path(path_type=Path)
# An argument that changes a key, and is no name of a model.
_OVERRIDE = re.compile(r"-|\w+(\.[\w-]+)+=")


@click.command(context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--config", "config_path", type=_PATH, help="What is asked; default: the first run's own.")
@click.option(
    "--num-samples",
    type=click.IntRange(min=0),
    default=128,
    help="Answers to each problem that are drawn for pass@k, k up to 128; 0: none.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="At which they are drawn.",
)
@click.option("--json", "json_path", type=_PATH, help="A file for all numbers, those of each problem too.")
@click.option("--plot", "plot_path", type=_PATH, help="A .png or .svg file.")
@TRUST
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)
@click.argument("base")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="MODEL... [KEY=VALUE]...")
def compare(
    base: str,
    arguments: tuple[str, ...],
    config_path: Path | None,
    num_samples: int,
    temperature: float,
    json_path: Path | None,
    plot_path: Path | None,
    is_trusted: bool,
) -> None:
    """Print how models differ from BASE on held-out problems, as Markdown tables with 95% intervals.

    BASE and each MODEL are a model directory, NAME[@REVISION] of the hub, or RUN_DIR[@K] or RUN_DIR@best of
    a run. They are asked the same, one model after another. KEY=VALUE changes a key of the configuration.
    Start it with a launcher to use several ranks.
    """
    place = read_place()
    names = [base, *(each for each in arguments if not _is_override(each))]
    if len(names) == 1:
        raise UserError(f"MODEL: give at least one model to compare with BASE {base}")
    asked, references = resolve_models(
        names,
        config_path=config_path,
        overrides=[each for each in arguments if _is_override(each)],
        is_trusted=is_trusted,
    )
    for reference in references:
        check_model(reference.config.model)
    if place.rank == 0:
        _check_outputs(json_path, plot_path)
    task, heldout_sets = load_tasks(asked)
    drawing = Drawing(num_samples, temperature, asked.es.seed)
    with (
        make_reward_runner(asked.task, [task, *heldout_sets.values()]) as rewards,
        Environments(drawing.settings(asked, is_greedy=True), tasks_by_key(task, heldout_sets)) as played,
        Environments(drawing.settings(asked), _with_harness(task)) as drawn,
    ):
        from shardes.evaluation.comparing import compare_results
        from shardes.evaluation.comparison_table import comparison_lines
        from shardes.evaluation.measuring import Comparison
        from shardes.rollout.preparing import prepare_tasks
        from shardes.session import join_job
        from shardes.utils.logs import configure_logging

        configure_logging()
        date = _date_of(references)
        stop = Stop()
        with join_job(asked, stop=stop) as world:
            # Every model is tried before the first one answers.
            references = [_fetched(each, world) for each in references]
            prepared = [
                prepare_tasks(each.config, task, heldout_sets, environments=played, date=date, trains=False)
                for each in references
            ]
            comparison = Comparison(asked, drawing, task, heldout_sets, rewards, played, drawn)
            results: list[ModelResult] = []
            for name, reference, tasks in zip(names, references, prepared, strict=True):
                job = {"stop": stop, "world": world}
                results.append(_measure(comparison, reference, tasks, name=name, job=job))
                # One model at a time: parts of a session may refer to each other.
                gc.collect()
                report = compare_results(results, drawing=drawing, pass_reward=asked.eval.pass_reward)
                # After every model: what hours have found is not lost with the next one.
                if place.rank == 0 and json_path is not None:
                    _write(json_path, report)
    if place.rank == 0:
        if plot_path is not None:
            from shardes.monitor.comparison_plot import plot_comparison

            plot_comparison(report, plot_path)
        click.echo("\n".join(comparison_lines(report)))


def _fetched(reference: ModelRef, world: "Group") -> ModelRef:
    """Return a reference whose model is here; a collective of all ranks."""
    from shardes.models.node_fetch import fetch_for_job

    if reference.config.model.is_here:
        return reference
    model = fetch_for_job(reference.config.model, world, recorded=reference.recorded_commit)
    return reference.with_config(reference.config.model_copy(update={"model": model}))


def _measure(
    comparison: "Comparison",
    reference: ModelRef,
    prepared: "PreparedTasks",
    *,
    name: str,
    job: dict[str, Any],
) -> "ModelResult":
    """Measure one model, of which nothing is kept; a collective of all ranks."""
    from shardes.session import open_session

    with open_session(reference.config, **job) as session:
        reference.restore(session)
        iteration = None if reference.history is None else reference.iteration
        return comparison.measure(session, prepared, name=name, iteration=iteration)


def _with_harness(task: Task) -> dict[str, Task]:
    """Return the task by its key if a harness plays its episodes, else nothing."""
    has_harness = task.episodes is not None and isinstance(task.episodes.program, HarnessSpec)
    return {"task": task} if has_harness else {}


def _is_override(argument: str) -> bool:
    """Return whether an argument changes a key; a directory that is there is a model whatever its name."""
    is_there = any(Path(name).exists() for name in (argument, argument.rpartition("@")[0]) if name)
    return not is_there and _OVERRIDE.match(argument) is not None


def _date_of(references: Sequence[ModelRef]) -> str | None:
    """Return the date that all prompts have: that of the first run whose prompts have one."""
    return next((each.date for each in references if each.date is not None), None)


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def _check_outputs(json_path: Path | None, plot_path: Path | None) -> None:
    """Make the directories of the files that are wanted, before hours of work come of it.

    Raises:
        UserError: One cannot be written.
    """
    if plot_path is not None:
        check_picture(plot_path)
    for path in (json_path, plot_path):
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path}: is a directory; give a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path.parent}: cannot be made: {error.strerror}") from None
