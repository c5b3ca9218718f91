"""Console commands that look at runs and at the machine; nothing heavy is imported before one runs."""

import sys
from pathlib import Path

import click

from shardes.backends.registry import BACKENDS
from shardes.config.consent import FLAG
from shardes.distributed.place import read_place
from shardes.errors import EXIT_FAILURE, UserError
from shardes.runs.directory import read_run, read_run_journal
from shardes.utils.logs import printable
from shardes.utils.reading import open_regular

_PATH = click.Path(path_type=Path)

# Options of several commands.
BASE = click.option(
    "--base",
    type=_PATH,
    help="The base model's directory, if it was moved since the run, or its name on the hub.",
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="single",
    show_default=True,
    help="Another than single spreads the model over the ranks of a launcher.",
)
TRUST = click.option(
    FLAG,
    "is_trusted",
    is_flag=True,
    help="Let code run that a run directory, or the configuration in it, names.",
)


@click.command()
@click.argument("run_dir", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="The records as JSON, one a line.")
def journal(run_dir: Path, as_json: bool) -> None:
    """Print RUN_DIR's journal for people: what the run is, and a line for every iteration.

    Nothing is changed, and a run that is going on may be looked at.
    """
    from shardes.monitor.journal_table import report as journal_report

    _, history, good_bytes, num_bytes = read_run_journal(run_dir)
    if as_json:
        with open_regular(run_dir / "journal.jsonl") as file:
            click.echo(file.read(good_bytes).decode(), nl=False)
    else:
        click.echo(printable("\n".join(journal_report(history))))
    if num_bytes > good_bytes:
        torn = f"its last line is incomplete ({num_bytes - good_bytes} bytes) and does not count"
        click.echo(f"{run_dir}: {torn}", err=True)


@click.command()
@click.argument("run_dir", type=_PATH)
@click.option(
    "--export", "export_dir", type=_PATH, help="An exported model that must hold the run's weights."
)
@BASE
@BACKEND
@TRUST
@click.pass_context
def verify(
    context: click.Context,
    run_dir: Path,
    export_dir: Path | None,
    base: Path | None,
    backend: str,
    is_trusted: bool,
) -> None:
    """Replay RUN_DIR's journal over the base model, and compare what RUN_DIR says with that.

    Weights are compared by digest with the journal's and those in metrics.jsonl, after every iteration, and
    with snapshots. The exit status is 1 if something differs, and the first iteration that does is named.
    """
    read_place()
    config, header, history = read_run(run_dir, base=base, backend=backend, is_trusted=is_trusted)
    if export_dir is not None and not export_dir.is_dir():
        raise UserError(f"--export {export_dir}: is not a directory; give that of an exported model")
    from shardes.monitor.verify import verify_run
    from shardes.session import open_session
    from shardes.utils.logs import configure_logging

    configure_logging()
    with open_session(config) as session:
        session.follow(header, run_dir)
        found = verify_run(session, history, run_dir=run_dir, export=export_dir)
        if session.mesh.world.is_main:
            click.echo(
                f"{run_dir}: {found.num_iterations} iterations replayed, {found.num_compared} digests "
                f"compared, {found.num_snapshots} snapshots read"
            )
            for iteration in found.export_iterations[-1:]:
                click.echo(f"{export_dir}: the weights after {iteration} iterations")
            for problem in found.problems:
                click.echo(f"DIFFERENT: {problem}")
            click.echo("something differs" if found.problems else "all is as it should be")
    context.exit(EXIT_FAILURE if found.problems else 0)


@click.command()
@click.argument("run_dir", type=_PATH)
@click.option("--iteration", type=click.IntRange(min=0), help="Updates before them; default: the last.")
@click.option("--member", "is_of_members", is_flag=True, help="Of the first member, not of the centre.")
@click.option("--num-samples", type=click.IntRange(min=1), default=4, show_default=True)
def samples(run_dir: Path, iteration: int | None, is_of_members: bool, num_samples: int) -> None:
    """Print answers of RUN_DIR, or whole conversations of its episodes, with what they earned."""
    from shardes.monitor.samples import shown_samples

    lines = shown_samples(run_dir, iteration=iteration, is_of_members=is_of_members, num_samples=num_samples)
    click.echo(printable("\n".join(lines)))


@click.command()
@click.argument("run_dirs", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, default="reward.png", show_default=True, help="A .png or .svg file.")
@click.option("--reward-only", is_flag=True, help="Leave out where the time goes, and the instruments.")
def plot(run_dirs: tuple[Path, ...], out: Path, reward_only: bool) -> None:
    """Draw the metrics of one or several runs: rewards, where the time goes, and the instruments."""
    from shardes.monitor.plot import plot_runs

    plot_runs(list(run_dirs), out, reward_only=reward_only)
    click.echo(str(out))


@click.command()
@click.argument("run_dir", type=_PATH)
@click.option("--out", type=_PATH, help="The file; default: report.html in RUN_DIR.")
def report(run_dir: Path, out: Path | None) -> None:
    """Write RUN_DIR as one HTML file: curves, samples, instruments and settings.

    The file opens anywhere, without a network. A run that is going on may be looked at.
    """
    from shardes.monitor.report import write_report

    file = run_dir / "report.html" if out is None else out
    write_report(run_dir, file)
    click.echo(str(file))


@click.command()
@click.argument("run_dir", type=_PATH)
@click.option("--once", is_flag=True, help="Print how the run is now, and end.")
@click.option(
    "--every",
    "every_seconds",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
def watch(run_dir: Path, once: bool, every_seconds: float) -> None:
    """Follow the run in RUN_DIR until it is finished; all that takes is to see its files.

    Control-C ends the watching, and nothing else.
    """
    from shardes.monitor.watch import watch as watch_run

    is_terminal = sys.stdout.isatty()
    for text in watch_run(run_dir, once=once, every_seconds=every_seconds, is_terminal=is_terminal):
        click.echo(text, nl=False)


@click.command()
def env() -> None:
    """Print versions, devices, and what can be used or why not, for bug reports."""
    from shardes.monitor.env import describe

    click.echo("\n".join(f"{name}: {value}" for name, value in describe().items()))


COMMANDS = (journal, verify, samples, plot, watch, report, env)
