"""Measure what an iteration does to a shard: members made one after the other, and the update.

A shard of about 20 million elements, with the parameters of a Llama, goes through a whole iteration: the
first member, which restores everything that the last update has changed, the other members, each of which
restores the last one's part if its own is another, and perturbs its own, and the update. All numbers of parts
take turns.

Seconds are the processor's time of one thread, so that other programs on the machine count as little as
possible; the best turn is the one least disturbed. "Times K" is the time with one part over the time with K,
over K: 1 would be a K-th of the work.

    python tools/bench/subspaces.py --json benchmarks/subspaces-cpu.json
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from common import Row, machine_facts, show, write_report
from noise import cpu_name

from shardes.backends.shard import Shard, ShardSpan
from shardes.es.update import Perturbation, Update
from shardes.noise import NOISE_VERSION
from shardes.noise.kinds.registry import KindName, make_kind
from shardes.noise.parts import part_of_direction
from shardes.weights.gathered import GatheredWeights
from shardes.weights.master import Weights

SIGMA, COEFFICIENT = 1e-3, 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HIDDEN, INNER, VOCABULARY, OF_KEYS = 768, 2048, 8192, 256
SHAPES: dict[str, tuple[int, ...]] = {
    "lm_head": (VOCABULARY, HIDDEN),
    "model.embed_tokens": (VOCABULARY, HIDDEN),
    "model.layers.0.input_layernorm": (HIDDEN,),
    "model.layers.0.mlp.down_proj": (HIDDEN, INNER),
    "model.layers.0.mlp.gate_proj": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj": (INNER, HIDDEN),
    "model.layers.0.self_attn.k_proj": (OF_KEYS, HIDDEN),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj": (OF_KEYS, HIDDEN),
    "model.norm": (HIDDEN,),
}


class Tensors(SimpleNamespace):
    """As much of a backend as weights need: whole parameters, or a rank's columns of every matrix.

    Args:
        dtype: Dtype of the working tensors.
        ranks: Number of ranks that share the columns of a matrix; this is the first of them.
    """

    def __init__(self, dtype: torch.dtype, *, ranks: int) -> None:
        shards = []
        for number, (name, shape) in enumerate(SHAPES.items()):
            width = shape[-1] // ranks
            rows = shape[0] if len(shape) == 2 else 1
            shape = (rows * ranks, shape[-1]) if len(shape) == 2 else shape
            local = torch.zeros(rows * ranks * width if len(shape) == 2 else width, dtype=dtype)
            if ranks == 1 or len(shape) == 1:
                spans = (ShardSpan(0, 0, local.numel()),)
            else:
                spans = (ShardSpan(0, 0, width, rows=shape[0], stride=shape[1]),)
            shards.append(Shard(name, number, shape, local, spans))
        model = torch.nn.Module()
        for shard in shards if ranks == 1 else ():
            parameter = torch.nn.Parameter(shard.local.view(shard.shape), requires_grad=False)
            model.register_parameter(shard.name.replace(".", "/"), parameter)
        by_name = [(name.replace("/", "."), parameter) for name, parameter in model.named_parameters()]
        whole = SimpleNamespace(named_parameters=lambda: by_name)
        super().__init__(
            shards=tuple(shards),
            aliases={},
            dtype=dtype,
            device=torch.device("cpu"),
            commit=lambda: None,
            reserve=lambda: None,
            gathered=lambda: whole,
        )


def make_side(
    where: str, dtype: torch.dtype, kind: KindName, num_parts: int, members: int
) -> Callable[[int], dict[str, float]]:
    """Return a function that goes through iteration ``number`` and returns the seconds of its phases."""
    backend: Any = Tensors(dtype, ranks=2 if where == "columns" else 1)
    weights = Weights(backend, seed=0, kind=make_kind(kind, num_parts=num_parts))
    for tensor in weights.masters.tensors.values():
        tensor.normal_()
    whole = GatheredWeights(backend, weights) if where == "gathered" else None
    perturb = weights.perturb if whole is None else whole.perturb

    # Those of a part in a row, as the scheduler has them.
    order = sorted(range(members), key=lambda member: (part_of_direction(member, num_parts), member))

    def iteration(number: int) -> dict[str, float]:
        if whole is not None:
            whole.refresh()  # the same for every number of parts, so it is not measured
        times = [time.thread_time()]
        for member in order:
            perturb(Perturbation(number, member, SIGMA))
            times.append(time.thread_time())
        weights.update(Update(number, [COEFFICIENT] * members))
        times.append(time.thread_time())
        return {
            "first": times[1] - times[0],
            "others": times[-2] - times[1],
            "update": times[-1] - times[-2],
            "all": times[-1] - times[0],
        }

    return iteration


HEADER = "where    noise       dtype     parts | first ms  member ms  update ms | iteration ms   times K"


@click.command()
@click.option("--members", type=click.IntRange(min=2), default=30, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--parts", type=click.IntRange(min=2), multiple=True, help="Repeatable.  [default: 4 and 16]")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures."
)
def main(*, members: int, turns: int, parts: tuple[int, ...], json_path: Path | None) -> None:
    """Measure members and update for several numbers of parts."""
    torch.set_num_threads(1)
    facts = machine_facts("cpu") | {"cpu": cpu_name(), "noise_version": NOISE_VERSION, "threads": 1}
    show(facts)
    click.echo(f"\nan iteration of {members} members; the best of {turns} turns\n\n{HEADER}")
    rows: list[Row] = []
    sides_of_kinds: list[tuple[str, KindName]] = [("shard", "gaussian"), ("shard", "rademacher")]
    sides_of_kinds += [("columns", "gaussian"), ("gathered", "gaussian")]
    cases: list[tuple[str, KindName, str]] = [
        (where, kind, dtype) for where, kind in sides_of_kinds for dtype in DTYPES
    ]
    for where, kind, dtype in cases:
        numbers = (1, *(parts or (4, 16)))
        sides = {num: make_side(where, DTYPES[dtype], kind, num, members) for num in numbers}
        found: dict[int, list[dict[str, float]]] = {num: [] for num in numbers}
        for turn in range(turns + 1):  # the first compiles and touches memory
            for num, side in sides.items():
                phases = side(turn)
                if turn:
                    found[num].append(phases)
        plain = min(turn["all"] for turn in found[1])
        for num, turns_of_side in found.items():
            best = {name: min(turn[name] for turn in turns_of_side) for name in turns_of_side[0]}
            median = statistics.median(turn["all"] for turn in turns_of_side)
            row: Row = {"where": where, "noise": kind, "dtype": dtype, "parts": num, "members": members}
            elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
            row |= {"elements": elements, "seconds": turns_of_side, "best": best, "median_all": median}
            row["times_parts"] = plain / best["all"] / num
            rows.append(row)
            one = best["others"] / (members - 1)
            click.echo(
                f"{where:<8} {kind:<11} {dtype:<9} {num:>5} | {best['first'] * 1e3:>8.1f}  {one * 1e3:>9.2f}"
                f"  {best['update'] * 1e3:>9.1f} | {best['all'] * 1e3:>12.1f}  {row['times_parts']:>8.2f}"
            )
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
