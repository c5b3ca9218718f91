"""Measure the cost of a member: seconds by part, bytes received and memory, for backends and ways to gather.

A Llama of about 100 million random parameters is written to a temporary directory. Every combination of
number of ranks, backend and way to gather is a job of its own under torchrun: one iteration to warm up, one
that is measured, and one whose collectives are counted. The same prompts go through transformers'
``generate`` in one process.

    python tools/bench/sharding.py --world-size 1 --world-size 2 --json benchmarks/sharding.json

Seconds are a member's, an iteration's divided by the population: those of the job in the column "member", so
that members evaluated at the same time share them, and those of rank 0 in the columns of parts. Received is
what rank 0 receives for a member, counted at torch's collectives as the usual algorithms send it: of a gather
over W ranks (W - 1) / W of its output, of a reduction twice that of its operand, of another's broadcast all.
A gather through memory that ranks share counts like any other.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, get_args
from unittest import mock

import click
import torch
import torch.distributed as dist
from common import CONSTANT, Row, machine_facts, run_job, show, write_model, write_report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardes.backends.registry import BACKENDS
from shardes.config.loading import parse_config
from shardes.config.schema import RolloutConfig
from shardes.distributed.shared_memory import SharedMemory

GATHERS = [gather for gather in get_args(RolloutConfig.model_fields["gather"].annotation) if gather != "auto"]
PARTS = ("perturb", "gather", "rollout", "reward", "wait")
SIGMA = 1e-3


def possible(backend: str, gather: str, *, shard_size: int) -> bool:
    """Return True if a backend has a way to gather that differs from its others."""
    if backend == "single":
        return gather == "member"
    if gather == "iteration" and shard_size == 1:
        return False
    return gather == "layer" or backend != "tensor_parallel"


def write_problems(path: Path, *, num_prompts: int) -> None:
    """Write prompts of different lengths."""
    rows = [{"prompt": f"{i}" + "+7" * (1 + i % 6) + "="} for i in range(num_prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class ReceivedBytes(TorchDispatchMode):
    """Counter of the bytes that this rank receives in collectives, all taken to be of a replica's ranks."""

    def __init__(self, shard_size: int) -> None:
        super().__init__()
        self._shard_size = shard_size
        self.total = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        space, _, name = function._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional"):
            size = self._shard_size
            share = {"gather": 1 - 1 / size, "reduce": 2 * (1 - 1 / size), "broadcast": 1.0}
            found = result if space == "_c10d_functional" else args[0]
            if name == "broadcast_" and args[2] == dist.get_rank() % size:
                return result  # this rank sends
            for kind, factor in share.items():
                if kind in name and "wait" not in name:
                    tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
                    self.total += factor * sum(t.numel() * t.element_size() for t in tensors)
                    break
        return result

    def __enter__(self) -> Self:
        gather = SharedMemory.gather

        def counted(memory: SharedMemory, local: torch.Tensor, output: torch.Tensor) -> None:
            gather(memory, local, output)
            self.total += (1 - 1 / self._shard_size) * output.numel() * output.element_size()

        self._patch = mock.patch.object(SharedMemory, "gather", counted)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        self._patch.stop()
        super().__exit__(*arguments)


def peak_memory_bytes() -> int:
    """Return the peak memory of the accelerator, if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def stopwatch(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to ``seconds[name]``."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def measure(tree: dict[str, Any], out: Path) -> None:
    """Measure one job on each of its ranks; rank 0 writes the figures."""
    from shardes.es.strategy import Strategy
    from shardes.es.update import Update
    from shardes.rollout.build import make_evaluator, make_scheduler
    from shardes.rollout.iteration import IterationSpec
    from shardes.session import open_session
    from shardes.tasks.loading import load_task

    config = parse_config(tree, source="benchmark")
    num_members = config.es.population
    assert isinstance(num_members, int), "it is the same in every iteration"
    with open_session(config) as session:
        world = session.mesh.world
        task = load_task(config.task)
        rollout, *_ = make_evaluator(session, task)
        population = make_scheduler(session, rollout)
        strategy = Strategy(config.es, num_elements=0)
        seconds: dict[str, float] = {}
        found = {}

        def iteration(number: int, members: int) -> None:
            nonlocal found
            found = population.evaluate_members(
                range(members),
                spec=IterationSpec(number, task.train, rollout, strategy),
                on_result=lambda _: None,
            )

        def update(number: int) -> None:
            coefficients = [1e-4] * num_members
            session.weights.update(Update(number, coefficients))

        num_teams = world.world_size // rollout.engine.group.world_size
        iteration(0, num_teams)
        update(0)
        world.barrier()
        session.timer.take()
        with stopwatch(seconds, "member"):
            iteration(1, num_members)
        parts = session.timer.take()
        with stopwatch(seconds, "update"):
            update(1)
        peak = peak_memory_bytes()
        # Only what is gathered for a whole iteration has to be counted over one.
        num_counted = num_members if rollout.engine.gather == "iteration" else num_teams
        with ReceivedBytes(session.mesh.shard.world_size) as received:
            iteration(2, num_counted)
        row = {name: parts.get(name, 0.0) / num_members for name in PARTS}
        row |= {name: value / num_members for name, value in seconds.items()}
        row["received_bytes"] = received.total / num_counted
        row["num_tokens"] = sum(result.num_tokens for result in found.values()) / num_counted
        row["peak_memory_bytes"] = peak
        if world.is_main:
            out.write_text(json.dumps(row))


def measure_plain(tree: dict[str, Any], out: Path) -> None:
    """Measure the same prompts with transformers' own ``generate``, micro-batch by micro-batch."""
    from transformers import AutoModelForCausalLM

    from shardes.models.build import load_tokenizer
    from shardes.rollout.batching import compose
    from shardes.tasks.loading import load_task

    config = parse_config(tree, source="benchmark")
    torch.set_num_threads(config.parallel.threads_per_rank or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=False)
    dtype = getattr(torch, config.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype).to(device).eval()
    size = config.rollout.micro_batch_size
    assert isinstance(size, int), "both sides are told the same"
    tokens = [tokenizer(row["prompt"])["input_ids"] for row in load_task(config.task).train]
    batches = compose(
        tokens,
        micro_batch_size=size,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    seconds: dict[str, float] = {}
    for turn in ("warm up", "member"):
        with stopwatch(seconds, turn), torch.no_grad():
            for batch in (b.to(device) for b in batches):
                model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    do_sample=False,
                    max_new_tokens=config.rollout.max_new_tokens,
                )
    out.write_text(json.dumps({"member": seconds["member"], "peak_memory_bytes": peak_memory_bytes()}))


def start(tree: dict[str, Any], *, world_size: int, folder: Path) -> Row:
    """Run a job to its end; return the figures of rank 0, or the reason why it failed."""
    found = run_job(__file__, tree, world_size=world_size, folder=folder)
    return {"failure": found} if isinstance(found, str) else found


HEADER = (
    "ranks  shard  backend          gather    |  member s |"
    "  perturb   gather  rollout   reward     wait   update |  received MB  peak MB"
)


def formatted(row: Row) -> str:
    """Format a row under ``HEADER``."""
    place = f"{row['ranks']:>5}  {row['shard_size']:>5}  {row['backend']:<15}  {row['way']:<8}"
    if "failure" in row:
        return f"{place} | {row['failure']}"
    parts = " ".join(f"{row[name]:>8.3f}" if name in row else " " * 8 for name in (*PARTS, "update"))
    received = f"{row['received_bytes'] / 1e6:>11.1f}" if "received_bytes" in row else " " * 11
    return f"{place} | {row['member']:>9.3f} | {parts} |  {received}  {row['peak_memory_bytes'] / 1e6:>7.0f}"


@click.command()
@click.option(
    "--world-size",
    "world_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1, 2, 4),
    show_default=True,
)
@click.option(
    "--backend", "backends", type=click.Choice(list(BACKENDS)), multiple=True, default=list(BACKENDS)
)
@click.option("--gather", "gathers", type=click.Choice(GATHERS), multiple=True, default=GATHERS)
@click.option(
    "--shard-size", type=click.IntRange(min=1), help="Ranks of a replica.  [default: all; 1 for single]"
)
@click.option("--layers", type=click.IntRange(min=1), default=14, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--members", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--micro-batch", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each rank.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--job", type=click.Path(path_type=Path), nargs=2, hidden=True)
def main(
    *,
    world_sizes: tuple[int, ...],
    backends: tuple[str, ...],
    gathers: tuple[str, ...],
    shard_size: int | None,
    layers: int,
    dtype: str,
    members: int,
    prompts: int,
    micro_batch: int,
    new_tokens: int,
    threads: int,
    json_path: Path | None,
    job: tuple[Path, Path] | None,
) -> None:
    """Measure what a member costs in every backend, for every way to gather."""
    if job is not None:
        tree = json.loads(job[0].read_text())
        (measure if "WORLD_SIZE" in os.environ else measure_plain)(tree, job[1])
        sys.stdout.flush()
        os._exit(0)  # as shardes.cli.main does, and for the same reason
    with tempfile.TemporaryDirectory(prefix="shardes-bench-") as name:
        folder = Path(name)
        num_parameters = write_model(folder / "model", layers=layers)
        write_problems(folder / "problems.jsonl", num_prompts=prompts)
        facts = {
            "parameters": num_parameters,
            "dtype": dtype,
            "members": members,
            "prompts": prompts,
            "micro_batch_size": micro_batch,
            "max_new_tokens": new_tokens,
            "threads_per_rank": threads,
            **machine_facts("cuda" if torch.cuda.is_available() else "cpu"),
        }
        show(facts)
        click.echo(f"\n{HEADER}")
        rows: list[Row] = []

        def run(ranks: int, backend: str, gather: str, size: int | None) -> None:
            tree = {
                "model": {"path": str(folder / "model"), "dtype": dtype},
                "run": {"dir": str(folder / "run")},
                "parallel": {"backend": backend, "threads_per_rank": threads, "shard_size": size},
                "rollout": {
                    "gather": gather,
                    "micro_batch_size": micro_batch,
                    "max_new_tokens": new_tokens,
                },
                "es": {"iterations": 1, "population": members, "sigma": SIGMA},
                "task": {"data": str(folder / "problems.jsonl"), "reward": CONSTANT},
            }
            shown = size or (1 if backend == "single" else ranks)
            place = {"ranks": ranks or 1, "shard_size": shown or 1, "backend": backend, "way": gather}
            rows.append(place | start(tree, world_size=ranks, folder=folder))
            if ranks == 0:
                rows[-1] |= {"backend": "transformers", "way": "generate"}
            click.echo(formatted(rows[-1]))

        run(0, "single", "member", None)
        for ranks in world_sizes:
            for backend in backends:
                for gather in gathers:
                    if possible(backend, gather, shard_size=shard_size or ranks):
                        run(ranks, backend, gather, shard_size)
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
