"""Lines of a study, one for each run: read, appended to, and made until none is missing."""

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import click

Line = dict[str, Any]
Run = TypeVar("Run", bound=tuple[Any, ...])


def read_lines(path: Path) -> list[Line]:
    """Return the whole lines of a file; none if there is no file."""
    text = path.read_text() if path.exists() else ""
    lines = []
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError):  # half a line, closed by the next writer
            lines.append(json.loads(line))
    return lines


def append_line(path: Path, line: Line) -> None:
    """Write a line at the end of a file."""
    is_whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as stream:
        # A line without an end, which a kill may have left, must not swallow this one.
        stream.write("\n" * (not is_whole) + json.dumps(line) + "\n")


def make_missing(
    out: Path,
    *,
    jobs: int,
    missing: Callable[[], Iterator[Run]],
    run_one: Callable[..., Line],
    summary: Callable[[Line], str],
    preload: Sequence[str] = (),
) -> bool:
    """Run what has no line yet, each run in a process of its own with one thread.

    Args:
        out: File of the lines.
        jobs: Number of runs at a time.
        missing: Function that yields the runs that can start now; it is asked again after every run.
        run_one: Function of a module that makes the line of a run, called with its parts.
        summary: Function that describes a line to people.
        preload: Names of modules that are imported once for all runs.

    Returns:
        Whether all runs have succeeded.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    # The server that forks the processes is a new interpreter: it does not know what was added to the path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    failed: set[Any] = set()
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        pending: dict[Any, Run] = {}
        while True:
            for each in missing():
                if len(pending) < jobs and each not in pending.values() and each not in failed:
                    pending[pool.submit(run_one, *each)] = each
            if not pending:
                return not failed
            future = next(as_completed(pending))
            each = pending.pop(future)
            try:
                line = future.result()
            except Exception as error:
                failed.add(each)
                click.echo(f"{each}: {type(error).__name__}: {error}", err=True)
                continue
            append_line(out, line)
            click.echo(f"{each}: {summary(line)}")
