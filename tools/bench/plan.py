"""Compare ``shardes plan`` with what runs take: the memory of each rank, and the time of an iteration.

Every case is a run of two iterations of the task in configs/own_task, with few members, prompts and tokens,
in one process or under torchrun. It is planned from its files alone, as ``shardes plan --device cpu`` does,
at the rates that all of its ranks measure at the same time when it is over.

    python tools/get_smollm2.py
    python tools/bench/plan.py --json benchmarks/plan-smollm2-cpu.json

With --again, the runs of that file are planned again, by the rates that were measured for them, and not run.

Memory is the most that the process of a rank has had at once (VmHWM), of all ranks the largest. Seconds are
those of the processor for rank 0, of the second iteration: what else runs on the machine does not count then,
nor does a wait for another rank. Answers that end early take less than what is planned for the longest.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from common import BY_LETTERS, ROOT, Row, machine_facts, run_job, show, write_report

MODEL = ROOT / "models" / "smollm2-135m-instruct"
GATHERS = ("iteration", "member", "layer")
# Backend, rollout.gather, ranks, members in a forward.
CASES = [
    ("single", "member", 1, 1),
    *((backend, gather, 2, 1) for backend in ("zero3", "fsdp") for gather in GATHERS),
    ("tensor_parallel", "layer", 3, 1),
    ("zero3", "iteration", 2, 2),
    ("zero3", "layer", 2, 2),
]


def peak_bytes() -> int:
    """Return the most bytes that this process has had at once."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(tree: dict[str, Any], out: Path) -> None:
    """Run a case, then measure the rates; rank 0 writes the figures."""
    from shardes.config.loading import parse_config
    from shardes.planning.rates import measured_machine
    from shardes.runs.reporting import Callbacks
    from shardes.session import open_session
    from shardes.tasks.loading import load_task
    from shardes.trainer import make_training_loop

    config = parse_config(tree, source="benchmark")
    ends: list[float] = []
    lines: list[dict[str, Any]] = []

    def on_iteration(line: dict[str, Any]) -> None:
        ends.append(time.process_time())
        lines.append(line)

    with open_session(config) as session:
        world = session.mesh.world
        make_training_loop(
            session, load_task(config.task), callbacks=Callbacks(on_iteration=[on_iteration])
        ).train()
        peak = peak_bytes()
        world.barrier()
        rates = vars(measured_machine(getattr(torch, config.model.dtype)))
        peaks = [ranks["peak"] for ranks in world.gather_json({"peak": peak})]
        if world.is_main:
            found = {
                "peak_bytes": max(peaks),
                "seconds": ends[1] - ends[0],
                "phases": lines[1]["seconds"],
                "num_tokens": lines[1]["num_tokens"],
                "rates": rates,
            }
            out.write_text(json.dumps(found))
        world.barrier()


def tree_of(folder: Path, case: tuple[str, str, int, int], *, facts: dict[str, Any], dtype: str) -> Any:
    """Return the configuration of a case."""
    backend, gather, ranks, together = case
    return {
        "model": {"path": facts["model"], "dtype": dtype},
        "run": {"dir": str(folder / f"{backend}-{gather}-{ranks}-{together}-{dtype}")},
        "parallel": {"backend": backend, "threads_per_rank": 1, "timeout_seconds": 1800},
        "rollout": {
            "gather": gather,
            "members_per_forward": together,
            "micro_batch_size": facts["micro_batch_size"],
            "max_new_tokens": facts["max_new_tokens"],
        },
        "es": {
            "iterations": 2,
            "population": facts["population"] * together,
            "sigma": 1e-3,
            "noise": "gaussian" if together == 1 else "low_rank",
        },
        "task": {
            "data": str(folder / "problems.jsonl"),
            "columns": {"prompt": "receipt"},
            "system": 'Answer with a JSON object {"total": NUMBER} and nothing else.',
            "reward": BY_LETTERS,
            "reward_workers": 0,
        },
    }


def compared(tree: dict[str, Any], found: dict[str, Any], *, ranks: int) -> Row:
    """Return the figures of a case beside what is planned for it."""
    from shardes.config.loading import parse_config
    from shardes.planning.machine import Machine
    from shardes.planning.rates import COLLECTIVE_SECONDS, used_bytes
    from shardes.planning.sources import plan_run

    config = parse_config(tree, source="benchmark")
    # Those of the ranks, but for the least time, which is not measured, and the process, which is a plan's.
    rates = found["rates"] | {"collective_seconds": COLLECTIVE_SECONDS, "process_bytes": used_bytes()}
    machine = Machine(**rates)
    plan, _ = plan_run(config, machine=machine, world_size=ranks)
    gather = tree["rollout"]["gather"]
    planned = {"bytes": plan.memory.needed(gather), "seconds": plan.cost(gather).seconds}
    return {
        "planned_bytes": planned["bytes"],
        "peak_bytes": found["peak_bytes"],
        "memory_ratio": planned["bytes"] / found["peak_bytes"],
        "planned_seconds": planned["seconds"],
        "seconds": found["seconds"],
        "time_ratio": planned["seconds"] / found["seconds"],
        "num_tokens": found["num_tokens"],
        "phases": found["phases"],
        "rates": found["rates"],
    }


def place_of(row: Row) -> tuple[Any, ...]:
    """Return what a row is a run of."""
    return tuple(row[key] for key in ("backend", "gather", "ranks", "together", "dtype"))


HEADER = (
    "backend          gather     members/forward  ranks  dtype    |"
    "  planned MiB  peak MiB  ratio |  planned s  cpu s  ratio"
)


def formatted(row: Row) -> str:
    """Format a row under ``HEADER``."""
    place = f"{row['backend']:<15}  {row['gather']:<9}  {row['together']:>15}  {row['ranks']:>5}  "
    place += f"{row['dtype']:<8}"
    if "failure" in row:
        return f"{place} | {row['failure']}"
    planned, peak = row["planned_bytes"] / 2**20, row["peak_bytes"] / 2**20
    return (
        f"{place} | {planned:>12.0f} {peak:>9.0f} {row['memory_ratio']:>6.2f} | "
        f"{row['planned_seconds']:>10.2f} {row['seconds']:>6.2f} {row['time_ratio']:>6.2f}"
    )


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=MODEL, help="Directory of the model.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["float32", "bfloat16"]),
    multiple=True,
    default=("bfloat16", "float32"),
)
@click.option("--backend", "backends", multiple=True, help="Of the cases; default: all.")
@click.option("--gather", "gathers", type=click.Choice(GATHERS), multiple=True, default=GATHERS)
@click.option("--prompts", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--population", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--again", is_flag=True, help="Plan the runs of the file of --json again.")
@click.option("--job", type=click.Path(path_type=Path), nargs=2, hidden=True)
def main(
    *,
    model: Path,
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    gathers: tuple[str, ...],
    prompts: int,
    population: int,
    new_tokens: int,
    json_path: Path | None,
    again: bool,
    job: tuple[Path, Path] | None,
) -> None:
    from shardes.backends.registry import BACKENDS
    from shardes.planning.rates import measured_machine

    if job is not None:
        measure(json.loads(job[0].read_text()), job[1])
        sys.stdout.flush()
        os._exit(0)  # as shardes.cli.main does, and for the same reason
    facts = {
        "model": str(model),
        "population": population,
        "prompts": prompts,
        "micro_batch_size": prompts,
        "max_new_tokens": new_tokens,
        "threads_per_rank": 1,
        **machine_facts("cpu"),
    }
    known: dict[tuple[Any, ...], Row] = {}
    if again:
        if json_path is None:
            raise click.UsageError("--again: there is no --json FILE with the runs; give it")
        report = json.loads(json_path.read_text())
        facts = report["facts"] | {"model": str(model), "planned_by": machine_facts("cpu")["shardes"]}
        known = {place_of(row): row for row in report["rows"] if "failure" not in row}
    show(facts)
    click.echo(f"\n{HEADER}")
    rows: list[Row] = []
    for name in ("zero3", "fsdp"):
        BACKENDS[name].load()
    measured_machine(torch.float32)  # as a plan does, which counts what that leaves in its memory
    with tempfile.TemporaryDirectory(prefix="shardes-bench-") as name:
        folder = Path(name)
        receipts = (ROOT / "configs" / "own_task" / "problems.jsonl").read_text().splitlines()
        (folder / "problems.jsonl").write_text("\n".join(receipts[:prompts]) + "\n")
        for dtype in dtypes:
            for case in CASES:
                backend, gather, ranks, together = case
                if (backends and backend not in backends) or gather not in gathers:
                    continue
                row: Row = {"backend": backend, "gather": gather, "ranks": ranks, "together": together}
                row |= {"dtype": dtype}
                tree = tree_of(folder, case, facts=facts, dtype=dtype)
                if again:
                    found: Any = known.get(place_of(row), "not among the runs of the file")
                else:
                    found = run_job(__file__, tree, world_size=0 if ranks == 1 else ranks, folder=folder)
                row |= {"failure": found} if isinstance(found, str) else compared(tree, found, ranks=ranks)
                rows.append(row)
                click.echo(formatted(row))
                # After each, for a run of all takes long.
                write_report(json_path, facts=facts | {"model": model.name}, rows=rows)


if __name__ == "__main__":
    main()
