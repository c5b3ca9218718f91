"""Run the commands of ``shardes``, importing nothing heavy before the configuration is checked."""

import json
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from shardes.config.consent import load_trusted
from shardes.config.old_keys import warn_once
from shardes.config.schema import Config
from shardes.distributed.place import Place, read_place
from shardes.distributed.stop import Stop, Stopped, stop_signals
from shardes.environments.runners import Environments, tasks_by_key
from shardes.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, JobError, StorageError, UserError
from shardes.evaluation.command import compare
from shardes.models.hub import check_model
from shardes.monitor.commands import BACKEND, BASE, COMMANDS, TRUST
from shardes.planning.command import plan
from shardes.planning.starter import HOW_TO_BEGIN, init
from shardes.rewards.pool import make_reward_runner
from shardes.runs.directory import read_run, write_lines
from shardes.runs.trackers import check_trackers
from shardes.tasks.generating import MAKEABLE, make_problems
from shardes.tasks.loading import load_tasks
from shardes.utils.shipped import copy_quickstart
from shardes.utils.sizes import Size
from shardes.utils.version import VERSION

# How long a rank that has a message waits for rank 0 to print the same one first.
_WAIT_FOR_MAIN_SECONDS = 10

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="shardes")
def cli() -> None:
    """Evolution strategies fine-tuning for language models sharded over many devices."""


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--config", "config_path", type=_PATH, help="The run's YAML file; shardes init writes one.")
@click.option("--dry-run", is_flag=True, help="Evaluate one member on two prompts, print a plan, and end.")
@TRUST
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def train(config_path: Path | None, dry_run: bool, is_trusted: bool, overrides: tuple[str, ...]) -> None:
    """Train, or go on with a run that stopped.

    KEY=VALUE changes a key of the file, for example es.sigma=0.002. Start it with deepspeed, torchrun or
    accelerate launch to use several ranks.
    """
    if config_path is None:
        raise UserError(HOW_TO_BEGIN)
    # What is quick to read comes first, so that a mistake is answered before anything heavy is imported.
    place = read_place()
    with stop_signals(num_ranks=place.world_size) as stop:
        config = load_trusted(config_path, list(overrides), is_trusted=is_trusted)
        _train(config, place=place, stop=stop, dry_run=dry_run)


def _train(config: Config, *, place: Place, stop: Stop, dry_run: bool) -> None:
    check_model(config.model)
    if place.rank == 0:  # whose metrics they are told
        check_trackers(config.log.report_to)
    task, heldout_sets = load_tasks(config)
    # Processes for rewards come before threads, process groups and accelerators.
    with (
        make_reward_runner(config.task, [task, *heldout_sets.values()]) as rewards,
        Environments(config, tasks_by_key(task, heldout_sets)) as environments,
    ):
        from shardes.models.build import skeleton_of
        from shardes.rollout.preparing import prepared_job
        from shardes.session import open_session
        from shardes.trainer import make_training_loop
        from shardes.utils.logs import configure_logging, tell_user

        configure_logging()
        try:
            with prepared_job(config, task, heldout_sets, environments=environments, stop=stop) as job:
                tasks = job.tasks
                parts: dict[str, Any] = {
                    "rewards": rewards,
                    "environments": environments,
                    "encoder": tasks.encoder,
                }
                # Before the session: a backend may change the classes that models are made of.
                model = skeleton_of(job.config) if dry_run else None
                with open_session(job.config, stop=stop, world=job.world) as session:
                    if model is None:
                        make_training_loop(
                            session, tasks.task, heldout_sets=tasks.heldout_sets, **parts
                        ).train()
                        return
                    from shardes.planning.dry_run import dry_run as try_member

                    lines = try_member(session, tasks.task, model=model, **parts)
                    if session.mesh.world.is_main:
                        click.echo("\n".join(lines))
        except Stopped:
            if place.rank == 0:
                tell_user(stop.farewell)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--model",
    required=True,
    help="A model directory, NAME[@REVISION] of the hub, or RUN_DIR[@K] or RUN_DIR@best of a run.",
)
@click.option("--config", "config_path", type=_PATH, help="What is asked; default: the run's configuration.")
@click.option("--out", type=_PATH, help="A JSONL file for every answer.")
@TRUST
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def evaluate(
    model: str, config_path: Path | None, out: Path | None, is_trusted: bool, overrides: tuple[str, ...]
) -> None:
    """Print what a model earns on held-out problems, as JSON, with 95% confidence intervals.

    KEY=VALUE changes a key of the configuration, for example rollout.samples_per_prompt=8 and
    rollout.temperature=0.7. Start it with a launcher to use several ranks.
    """
    from shardes.evaluation.model_ref import resolve_model

    read_place()
    model_ref = resolve_model(
        model, config_path=config_path, overrides=list(overrides), is_trusted=is_trusted
    )
    config = model_ref.config
    check_model(config.model)
    task, heldout_sets = load_tasks(config)
    with (
        make_reward_runner(config.task, [task, *heldout_sets.values()]) as rewards,
        Environments(config, tasks_by_key(task, heldout_sets)) as environments,
    ):
        from shardes.evaluation.summary import evaluate_model
        from shardes.rollout.preparing import prepare_tasks
        from shardes.session import job_with_model, open_session
        from shardes.utils.logs import configure_logging

        configure_logging()
        stop = Stop()
        with job_with_model(config, stop=stop, recorded=model_ref.recorded_commit) as (config, world):
            prepared = prepare_tasks(
                config, task, heldout_sets, environments=environments, date=model_ref.date, trains=False
            )
            with open_session(config, stop=stop, world=world) as session:
                model_ref.restore(session)
                sets, lines = evaluate_model(
                    session,
                    prepared.task,
                    rewards=rewards,
                    environments=environments,
                    heldout_sets=prepared.heldout_sets,
                    encoder=prepared.encoder,
                )
                is_main = session.mesh.world.is_main
        if is_main:
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_lines(out, lines)
            click.echo(json.dumps({"model": model, "iteration": model_ref.iteration, "sets": sets}, indent=2))


@cli.command()
@click.argument("run_dir", type=_PATH)
@click.argument("out_dir", type=_PATH)
@click.option(
    "--iteration", help="Weights after this many updates, or best: by held-out reward; default: all."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the weights in the files; default: that in which they were trained and evaluated.",
)
@click.option(
    "--max-shard-size",
    type=Size(positive=True),
    default="5GiB",
    show_default=True,
    help="Of a file in bytes; only a larger parameter makes a larger one.",
)
@click.option("--shard-size", "old_shard_size", type=Size(positive=True), hidden=True)
@click.option("--push-to-hub", metavar="NAME", help="Upload OUT_DIR to the Hugging Face hub as NAME, too.")
@click.option("--public", is_flag=True, help="Have the hub show NAME to everybody if it is new.")
@BASE
@BACKEND
@TRUST
def export(
    run_dir: Path,
    out_dir: Path,
    iteration: str | None,
    dtype: str | None,
    max_shard_size: int,
    old_shard_size: int | None,
    push_to_hub: str | None,
    public: bool,
    base: Path | None,
    backend: str,
    is_trusted: bool,
) -> None:
    """Write RUN_DIR's weights to OUT_DIR as a consolidated Hugging Face model.

    The journal is replayed over the base model, or over the nearest snapshot before the iteration. With
    another --backend, started by a launcher, every rank replays its own shards, so the model need not fit on
    one device.
    """
    if old_shard_size is not None:
        if click.get_current_context().get_parameter_source("max_shard_size") is ParameterSource.COMMANDLINE:
            raise UserError("--shard-size is the old name of --max-shard-size, and both are given; remove it")
        warn_once("--shard-size is now called --max-shard-size; the old name still works")
    # What is quick to read comes first, so that a mistake is answered before anything heavy is imported.
    place = read_place()
    _, _, history = read_run(run_dir, base=base, backend=backend, is_trusted=is_trusted)
    history.iteration_of(iteration, key=f"--iteration {iteration}")
    if public and push_to_hub is None:
        raise UserError("--public: it is for --push-to-hub NAME, which is not given")
    repository = None
    if push_to_hub is not None and place.rank == 0:
        from shardes.export.hub import HubRepository

        repository = HubRepository(push_to_hub, is_public=public)
    from shardes.export.from_run import export_run
    from shardes.utils.logs import configure_logging

    configure_logging()
    found = export_run(
        run_dir,
        out_dir,
        iteration=iteration,
        base=base,
        backend=backend,
        dtype=dtype,
        max_file_bytes=old_shard_size or max_shard_size,
        is_trusted=is_trusted,
    )
    if found.is_main:
        what = f"the weights after {found.iteration} iterations, {found.dtype}"
        click.echo(f"{out_dir}: {what}")
        if repository is not None:
            repository.push(out_dir, message=what.capitalize())
            click.echo(f"{repository.url}: uploaded")


@cli.command()
@click.argument("task", type=click.Choice(MAKEABLE))
@click.argument("out", type=_PATH)
@click.option("--num-problems", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--exclude", type=_PATH, help="A file of problems that OUT must not have, in any order.")
@click.option("--source", type=_PATH, help="For arc, which is not made: a directory of puzzles, *.json.")
def make_data(
    task: str, out: Path, num_problems: int, seed: int, exclude: Path | None, source: Path | None
) -> None:
    """Write problems of TASK to OUT as JSONL: made ones, or for arc those of a data set.

    Problems are a function of the arguments alone. Each has a solution, and no two are the same.
    """
    rows = make_problems(task, num_problems, seed=seed, exclude=exclude, source=source)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, rows)
    click.echo(f"{out}: {len(rows)} problems")


@cli.command()
@click.argument("directory", type=_PATH, default=Path())
def quickstart(directory: Path) -> None:
    """Copy the quickstart's configuration, model and problems into DIRECTORY, and say how to train there."""
    files = copy_quickstart(directory)
    click.echo(f"{directory}: {len(files)} files; to train with them, in one process or on two ranks:")
    if directory != Path():
        click.echo(f"    cd {shlex.quote(str(directory))}")
    click.echo("    shardes train --config configs/quickstart.yaml parallel.backend=single")
    several = "torchrun --nproc-per-node 2 -m shardes train --config configs/quickstart.yaml"
    click.echo(f"    {several} parallel.backend=fsdp")


for _command in (compare, init, plan, *COMMANDS):
    cli.add_command(_command)


def main(command: click.Command = cli) -> NoReturn:
    """Run a command, and end the process with its exit status."""
    is_launched = "WORLD_SIZE" in os.environ
    try:
        status = run(command)
    except Exception:
        if not is_launched:
            raise
        traceback.print_exc()
        status = EXIT_FAILURE
    if is_launched:
        # There was a process group. DeepSpeed keeps it, and so its threads, alive to the interpreter's very
        # end, where their destructors race and now and then abort a job whose work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(command: click.Command) -> int:
    """Run a command; return its exit status, which is 2 for a user's mistake, shown as one message."""
    try:
        status = command.main(prog_name="shardes" if command is cli else None, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except (click.ClickException, UserError, StorageError, JobError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _show_mistake(message, at_once=isinstance(error, JobError))
        return EXIT_USER_ERROR if isinstance(error, click.ClickException) else error.exit_status
    return status or 0  # a status if the command chose one, else nothing


def _rank_0_may_say_it() -> bool:
    try:
        return read_place().rank != 0
    except UserError:  # the mistake is that no rank can know another
        return False


def _show_mistake(message: str, *, at_once: bool) -> None:
    """Print a message once per job: on rank 0, and on another rank only if rank 0 prints none."""
    if not at_once and _rank_0_may_say_it():
        # The launcher ends this rank as soon as rank 0 has exited with the same error.
        time.sleep(_WAIT_FOR_MAIN_SECONDS)
    click.echo(f"Error: {message}", err=True)
