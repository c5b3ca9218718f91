"""Measure members in chunks against members one by one, on sharded weights: seconds, and bytes received.

A Llama of about 37 million random parameters, whose answers never end early, is written to a temporary
directory. For every number of ranks and every backend one job under torchrun measures the modes that evaluate
members of full rank one by one, and the batched ones with several numbers of members per forward.

    python tools/bench/batched.py --world-size 2 --json benchmarks/batched.json

Seconds are a member's: those of an iteration in which every team of ranks has two members, or two chunks of
them, divided by the number of members; the columns of prefill and decoding are rank 0's. Received is what
rank 0 receives for a member (see sharding.py). What is gathered once an iteration is shared by all members of
it, so that it depends on their number, which the table has, too.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from common import CONSTANT, Row, machine_facts, run_job, show, write_model, write_report
from sharding import ReceivedBytes, stopwatch, write_problems

from shardes.config.loading import parse_config

SIGMA = 1e-3
FULL_RANK = ("layer", "member", "iteration")
BATCHED = ("layer", "iteration")

SIZES = {
    "hidden_size": 640,
    "intermediate_size": 1760,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


@contextmanager
def timed_parts(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of the forwards before the first token, and of whole answers."""
    from shardes.rollout.engines.transformers.decoder import Decoder
    from shardes.rollout.engines.transformers.rows import Rows

    prefill, decode = Rows.prefill, Decoder.decode

    def timed_prefill(*arguments: Any, **named: Any) -> Any:
        with stopwatch(seconds, "prefill"):
            return prefill(*arguments, **named)

    def timed_decode(*arguments: Any, **named: Any) -> Any:
        with stopwatch(seconds, "answer"):
            return decode(*arguments, **named)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Rows, "prefill", timed_prefill))
        stack.enter_context(mock.patch.object(Decoder, "decode", timed_decode))
        yield


def measure(tree: dict[str, Any]) -> Row:
    """Measure one way to evaluate members, on every rank of a job."""
    from shardes.es.strategy import Strategy
    from shardes.rollout.build import make_evaluator, make_scheduler
    from shardes.rollout.iteration import IterationSpec
    from shardes.session import open_session
    from shardes.tasks.loading import load_task

    config = parse_config(tree, source="benchmark")
    with open_session(config) as session:
        world = session.mesh.world
        task = load_task(config.task)
        rollout, *_ = make_evaluator(session, task)
        population = make_scheduler(session, rollout)

        def iteration(number: int, members: int) -> None:
            strategy = Strategy(config.es.model_copy(update={"population": members}), num_elements=0)
            spec = IterationSpec(number, task.train, rollout, strategy)
            population.evaluate_members(spec.members, spec=spec, on_result=lambda _: None)
            # An update would follow; with it, what is gathered once an iteration is gathered anew.
            session.weights.version += 1

        # What is evaluated at the same time, twice.
        is_apart = config.rollout.is_batched or config.rollout.gather == "iteration"
        teams_are_ranks = is_apart and config.parallel.backend != "tensor_parallel"
        at_once = (world.world_size if teams_are_ranks else 1) * rollout.engine.members_per_forward
        num_members = 2 * at_once
        iteration(0, at_once)
        world.barrier()
        # A rank may have no micro-batch.
        seconds = {"prefill": 0.0, "answer": 0.0}
        with stopwatch(seconds, "member"), timed_parts(seconds):
            iteration(1, num_members)
        # What is gathered once an iteration serves all its members; anything else a member, or a chunk.
        shares = num_members if config.rollout.gather == "iteration" else at_once
        with ReceivedBytes(session.mesh.shard.world_size) as received:
            iteration(2, at_once)
        prefill, answer = seconds["prefill"], seconds["answer"]
        return {
            "num_members": num_members,
            "member": seconds["member"] / num_members,
            "prefill": prefill / num_members,
            "decode": (answer - prefill) / num_members,
            "received_bytes": received.total / shares,
        }


def measure_update(num_directions: int) -> Row:
    """Measure seconds of a matrix's update: full rank, rank 1, its matrix product alone, and by torch."""
    from shardes import noise
    from shardes.noise import GAUSSIAN, LowRank, NoiseKind, Region

    torch.set_num_threads(1)
    shape = (640, 1760)
    size = shape[0] * shape[1]
    # As many as a model has, one after the other: more than fits into a cache.
    masters = torch.zeros(16, *shape)
    left, right = torch.randn(shape[0], num_directions), torch.randn(num_directions, shape[1])
    generator = torch.Generator().manual_seed(0)

    def of_kind(kind: NoiseKind) -> Callable[[int, torch.Tensor], object]:
        def update(number: int, master: torch.Tensor) -> None:
            noise.accumulate(
                master.view(-1),
                region=Region(number, size, 0, size, shape=shape),
                coefficients=[1e-3] * num_directions,
                directions=range(num_directions),
                seed=0,
                iteration=0,
                kind=kind,
            )

        return update

    def by_torch(number: int, master: torch.Tensor) -> None:
        for _ in range(num_directions):
            master.add_(torch.randn(shape, generator=generator).mul_(1e-3))

    sides = {
        "full": of_kind(GAUSSIAN),
        "rank 1": of_kind(LowRank(1)),
        "product": lambda number, master: master.addmm_(left, right),
        "torch": by_torch,
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(6):  # the first of each compiles
        for name, update in sides.items():
            seconds: dict[str, float] = {}
            with stopwatch(seconds, "update"):
                for number, master in enumerate(masters):
                    update(number, master)
            found[name].append(seconds["update"] / len(masters))
    return {name: min(values[1:]) for name, values in found.items()}


def start(trees: list[Row], *, world_size: int, folder: Path) -> list[Row]:
    """Run a job that measures several ways; return the rows of rank 0, or the reason why it failed."""
    found = run_job(__file__, trees, world_size=world_size, folder=folder)
    return [{"failure": found} for _ in trees] if isinstance(found, str) else found


def measure_all(spec: Path, out: Path) -> None:
    """Measure on one rank of a job the ways that its file lists."""
    rows = [measure(tree) for tree in json.loads(spec.read_text())]
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(rows))
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason


HEADER = (
    "ranks  backend  gather           K  members |  member s  prefill s  decode s |  received MB |"
    "   times layer   times member"
)


def formatted(row: Row) -> str:
    """Format a row under ``HEADER``."""
    place = f"{row['ranks']:>5}  {row['backend']:<7}  {row['gather']:<14} {row['k'] or '':>3}"
    if "failure" in row:
        return f"{place} | {row['failure']}"
    times = "  ".join(f"{row[key]:>13.1f}" for key in ("times_layer", "times_member") if key in row)
    return (
        f"{place}  {row['num_members']:>7} | {row['member']:>9.4f}  {row['prefill']:>9.4f}  "
        f"{row['decode']:>8.4f} |  {row['received_bytes'] / 1e6:>11.2f} | {times}"
    )


@click.command()
@click.option("--world-size", "world_sizes", type=click.IntRange(min=1), multiple=True, default=(2,))
@click.option("--backend", "backends", type=click.Choice(["zero3", "fsdp", "tensor_parallel"]), multiple=True)
@click.option("--members-per-forward", "counts", type=click.IntRange(min=2), multiple=True, default=(4, 16))
@click.option("--rank", type=click.IntRange(min=1), default=1, show_default=True, help="Of the noise.")
@click.option("--prompts", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each rank.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--job", type=click.Path(path_type=Path), nargs=2, hidden=True)
def main(
    *,
    world_sizes: tuple[int, ...],
    backends: tuple[str, ...],
    counts: tuple[int, ...],
    rank: int,
    prompts: int,
    new_tokens: int,
    dtype: str,
    threads: int,
    json_path: Path | None,
    job: tuple[Path, Path] | None,
) -> None:
    """Measure members in chunks against members one by one."""
    if job is not None:
        measure_all(*job)
    with tempfile.TemporaryDirectory(prefix="shardes-bench-") as name:
        folder = Path(name)
        num_parameters = write_model(folder / "model", layers=8, eos_id=None, **SIZES)
        write_problems(folder / "problems.jsonl", num_prompts=prompts)
        update = measure_update(30)
        facts = {
            "parameters": num_parameters,
            "dtype": dtype,
            "rank": rank,
            "prompts": prompts,
            "max_new_tokens": new_tokens,
            "threads_per_rank": threads,
            **machine_facts("cuda" if torch.cuda.is_available() else "cpu"),
            "update of 640 x 1760 by 30 directions, full rank, seconds": round(update["full"], 6),
            "the same of rank 1": round(update["rank 1"], 6),
            "the product of its factors alone, by BLAS": round(update["product"], 6),
            "the update of full rank by torch's generator": round(update["torch"], 6),
        }
        show(facts)
        click.echo(f"\n{HEADER}")
        rows: list[Row] = []

        def tree(backend: str, mode: str, count: int | None) -> Row:
            return {
                "model": {"path": str(folder / "model"), "dtype": dtype},
                "run": {"dir": str(folder / "run")},
                "parallel": {"backend": backend, "threads_per_rank": threads},
                "rollout": {
                    "gather": mode,
                    "micro_batch_size": prompts if count else max(1, prompts // 2),
                    "max_new_tokens": new_tokens,
                    "members_per_forward": count or 1,
                },
                "es": {
                    "iterations": 1,
                    "sigma": SIGMA,
                    "noise": "low_rank" if count else "gaussian",
                    "rank": rank if count else 1,
                },
                "task": {"data": str(folder / "problems.jsonl"), "reward": CONSTANT},
            }

        for ranks in world_sizes:
            for backend in backends or ("zero3", "fsdp", "tensor_parallel"):
                splits = backend == "tensor_parallel"  # it has no other modes
                full_rank, batched = (("layer",), ("layer",)) if splits else (FULL_RANK, BATCHED)
                cases = [(mode, None) for mode in full_rank]
                cases += [(mode, count) for mode in batched for count in counts]  # type: ignore[misc]
                found = start([tree(backend, *case) for case in cases], world_size=ranks, folder=folder)
                seconds = {
                    case[0]: row.get("member") for case, row in zip(cases, found, strict=True) if not case[1]
                }
                for (mode, count), row in zip(cases, found, strict=True):
                    rows.append({"ranks": ranks, "backend": backend, "gather": mode, "k": count} | row)
                    for other in ("layer", "member"):
                        if count and "member" in row and seconds.get(other):
                            rows[-1][f"times_{other}"] = seconds[other] / row["member"]
                    click.echo(formatted(rows[-1]))
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
