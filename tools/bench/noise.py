"""Measures the noise's CPU kernels against ``torch.randn`` and against a plain copy.

Two operations, each with float32 master weights:

- perturb: ``shardes.noise.perturb`` against ``torch.randn`` and ``add_`` in the target's dtype;
- accumulate: ``shardes.noise.accumulate`` over some directions against ``randn``, ``mul_`` and ``add_`` for
  each of them.

Torch draws into a buffer that exists already, which is faster than a new tensor a call. The copy reads the
master and writes the target (for accumulate: another master), as the operation itself does at least. The
three take turns, so that a busy machine disturbs them all alike; the best turn is the one least disturbed.

    python tools/bench/noise.py --json benchmarks/noise.json
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numba
import torch

import shardes
from shardes import noise

SEED, SIGMA, COEFFICIENT = 1, 1e-3, 1e-4
# Torch's worker threads spin for a while after an operation, on the cores that the next side needs.
PAUSE_SECONDS = 0.02
TARGETS = (torch.float32, torch.bfloat16, torch.float16)

Row = dict[str, Any]


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "device": "cpu",
        "cpu": cpu_name(),
        "cores": str(num_cores()),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "shardes": shardes.__version__,
        "noise_version": str(noise.NOISE_VERSION),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def take_turns(sides: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of every side in every turn, after one turn that compiles and touches the memory."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            side()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def perturb_sides(elements: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The three sides of perturb."""
    generator = torch.Generator().manual_seed(SEED)
    master = torch.randn(elements, generator=generator)
    target, copied, weights, buffer = (torch.zeros(elements, dtype=dtype) for _ in range(4))

    def ours() -> None:
        address = {"seed": SEED, "iteration": 0, "direction": 0, "param_id": 0, "start": 0}
        noise.perturb(master, target, sigma=SIGMA, **address)

    def torchs() -> None:
        torch.randn(elements, generator=generator, dtype=dtype, out=buffer)
        weights.add_(buffer, alpha=SIGMA)

    return {"shardes": ours, "torch": torchs, "copy": lambda: copied.copy_(master)}


def accumulate_sides(elements: int, directions: int) -> dict[str, Callable[[], object]]:
    """The three sides of accumulate."""
    generator = torch.Generator().manual_seed(SEED)
    master, copied, weights, buffer = (torch.zeros(elements) for _ in range(4))

    def ours() -> None:
        noise.accumulate(
            master,
            coefficients=[COEFFICIENT] * directions,
            directions=range(directions),
            seed=SEED,
            iteration=0,
            param_id=0,
            start=0,
        )

    def torchs() -> None:
        for _ in range(directions):
            torch.randn(elements, generator=generator, out=buffer)
            weights.add_(buffer.mul_(COEFFICIENT))

    return {"shardes": ours, "torch": torchs, "copy": lambda: copied.copy_(master)}


def measure(
    operation: str, dtype: torch.dtype, *, elements: int, directions: int, threads: int, repeats: int
) -> Row:
    """One row of the table. Speeds are in normals a second: elements times directions."""
    torch.set_num_threads(threads)
    if operation == "perturb":
        directions = 1
        sides = perturb_sides(elements, dtype)
    else:
        sides = accumulate_sides(elements, directions)
    seconds = take_turns(sides, repeats=repeats)
    row: Row = {
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "directions": directions,
        "threads": threads,
        "elements": elements,
        "seconds": seconds,
    }
    for kind, pick in (("best", min), ("median", statistics.median)):
        ours, torchs, copy = (pick(seconds[name]) for name in ("shardes", "torch", "copy"))
        row[kind] = {
            "shardes_normals_per_second": elements * directions / ours,
            "torch_normals_per_second": elements * directions / torchs,
            "ratio_to_torch": torchs / ours,
            "share_of_copy": copy / ours,
        }
    return row


HEADER = (
    "operation   dtype     directions  threads |  shardes M/s  (median) |  torch M/s  (median) |"
    "  ratio  (median) |  of a copy"
)


def formatted(row: Row) -> str:
    """A row under ``HEADER``."""
    best, median = row["best"], row["median"]
    return (
        f"{row['operation']:<11} {row['dtype']:<9} {row['directions']:>10}  {row['threads']:>7} |"
        f"  {best['shardes_normals_per_second'] / 1e6:>11.0f}"
        f"  {median['shardes_normals_per_second'] / 1e6:>8.0f} |"
        f"  {best['torch_normals_per_second'] / 1e6:>9.0f}"
        f"  {median['torch_normals_per_second'] / 1e6:>8.0f} |"
        f"  {best['ratio_to_torch']:>5.2f}  {median['ratio_to_torch']:>8.2f} |"
        f"  {best['share_of_copy']:>9.0%}"
    )


@click.command()
@click.option("--elements", type=click.IntRange(min=1), default=2**24, show_default=True)
@click.option(
    "--directions",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Of accumulate, in one pass.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), multiple=True, help="Repeatable.  [default: 1 and all cores]"
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Timed turns of each side."
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all figures here.",
)
def main(
    *, elements: int, directions: int, threads: tuple[int, ...], repeats: int, json_path: Path | None
) -> None:
    """Measure the noise on the CPU against torch and against a copy."""
    facts = environment()
    for key, value in facts.items():
        click.echo(f"{key}: {value}")
    click.echo(
        f"\n{elements} elements; the best of {repeats} turns (and the median); M/s: million normals a second;"
    )
    click.echo("of a copy: its time over ours, for all directions together\n")
    click.echo(HEADER)
    rows = []
    for num_threads in threads or dict.fromkeys((1, num_cores())):
        for operation, dtype in (*(("perturb", dtype) for dtype in TARGETS), ("accumulate", torch.float32)):
            row = measure(
                operation,
                dtype,
                elements=elements,
                directions=directions,
                threads=num_threads,
                repeats=repeats,
            )
            rows.append(row)
            click.echo(formatted(row))
    if json_path is not None:
        command = ["python", *sys.argv]
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(
            json.dumps({"environment": facts, "command": command, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
