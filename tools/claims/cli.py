"""The commands ``run``, ``table`` and ``grpo``."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click

from claims import grpo
from claims.arms import ARMS, ROOT, TASKS
from claims.figures import Results
from claims.lines import Line, make_missing, read_lines
from claims.runs import current, final_reward, missing, run_one

LINES = ROOT / "benchmarks" / "claims.jsonl"
PAGE = ROOT / "benchmarks" / "claims.md"
# What is between these lines of the page is made; the rest is written by hand and stays.
BEGIN, END = "<!-- made by: python tools/claims table -->", "<!-- end of what is made -->"


def names(known: dict[str, object], text: str | None, *, option: str) -> list[str]:
    """Return the names that an option lists, separated by semicolons; None: all.

    Raises:
        UsageError: One is not known.
    """
    found = list(known) if text is None else [name.strip() for name in text.split(";")]
    for name in found:
        if name not in known:
            raise click.UsageError(f"{option}: got {name!r}; known: {'; '.join(known)}")
    return found


@click.group(help="Measure the paper's claims against TRL's GRPO.")
def main() -> None:
    pass


@main.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=LINES, help="A line of it is one run.")
@click.option("--jobs", default=1, help="Runs at a time, one thread each.")
@click.option("--tasks", help="Only these tasks, separated by semicolons.")
@click.option("--arms", help="Only these arms, separated by semicolons.")
@click.option("--seeds", help="Only these seeds, separated by commas, after the sweep.")
def run(out: Path, jobs: int, tasks: str | None, arms: str | None, seeds: str | None) -> None:
    """Run everything that has no line in the file yet; where it was stopped, the same command goes on."""
    os.chdir(ROOT)  # paths in configurations are relative to it
    wanted_tasks = names({**TASKS}, tasks, option="--tasks")
    wanted_arms = names({**ARMS}, arms, option="--arms")
    for task in wanted_tasks:
        if not (ROOT / TASKS[task].config).exists():
            raise click.UsageError(f"--tasks: {task} needs {TASKS[task].config}, which is not there")
    if find_spec("trl") is None and any(ARMS[arm].method == "grpo" for arm in wanted_arms):
        raise click.UsageError("--arms: those of GRPO need TRL; install the extra: shardes[study]")
    wanted_seeds = None if seeds is None else [int(seed) for seed in seeds.split(",")]

    def left() -> Iterator[tuple[str, str, float, int]]:
        return missing(current(read_lines(out)), wanted_tasks, wanted_arms, wanted_seeds)

    is_done = make_missing(
        out, jobs=jobs, missing=left, run_one=run_one, summary=summary, preload=["claims.preload"]
    )
    raise SystemExit(not is_done)


@main.command(context_settings={"show_default": True})
@click.option("--lines", "path", type=click.Path(path_type=Path, exists=True), default=LINES)
@click.option("--page", "page_path", type=click.Path(path_type=Path), default=PAGE, help="Markdown file.")
def table(path: Path, page_path: Path) -> None:
    """Write tables and pictures of the lines so far into the page."""
    from claims.pictures import draw
    from claims.tables import page

    results = Results(current(read_lines(path)))
    pictures = draw(results, page_path.with_suffix(""))
    text = page_path.read_text() if page_path.exists() else "# The paper's claims\n"
    page_path.write_text(replaced(text, page(results, pictures)))


def replaced(text: str, made: str) -> str:
    """Return the text of a page with the part that is made replaced, or added at its end."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    return f"{before.rstrip()}\n\n{BEGIN}\n\n{made.strip()}\n\n{END}{after}"


def summary(line: Line) -> str:
    """Return a line of the log for a run."""
    last = line["curve"][-1]
    measured = sum(point["seconds"] for point in line["curve"])
    return (
        f"{final_reward(line):.4f} after {last['num_completions']} answers, {last['core_seconds']:.0f} "
        f"core-seconds and {measured:.0f} of measuring, peak {line['peak_bytes'] / 2**20:.0f} MiB"
    )


main.add_command(grpo.main, "grpo")
