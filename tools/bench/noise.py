"""Measure the noise's kernels against torch's generator and against a plain copy.

Every operation starts from float32 master weights, unless the update's master is narrow:

- perturb: ``shardes.noise.perturb`` against ``randn`` and ``add_`` in the target's dtype;
- update: ``shardes.noise.accumulate`` over some directions against ``randn``, ``mul_`` and ``add_`` for each;
- raw: on a CPU, the update without coefficients and without a master: Philox and Box-Muller alone;
- digest: the weights digest.

Torch has two sides: as the loop is commonly written, a new tensor for each draw, and into a buffer that
exists already. The copy reads the master and writes the target (for update: another master), as the operation
itself does at least. All sides take turns, so that a busy machine disturbs them alike; the best turn is the
one least disturbed. On a GPU every turn is synchronised.

    python tools/bench/noise.py --json benchmarks/noise-cpu.json
    python tools/bench/noise.py --device cuda --elements 1073741824 --json benchmarks/noise-h200.json
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np
import torch
from common import Row, machine_facts, num_cores, show, write_report

from shardes import noise
from shardes.noise import GAUSSIAN, NoiseKind, Rademacher, Region
from shardes.noise.cpu_math import eight_normals, f32, u32
from shardes.noise.definition import BLOCK, LANES
from shardes.weights.digest import add_digest

SEED, SIGMA, COEFFICIENT = 1, 1e-3, 1e-4
# Torch's worker threads spin for a while after an operation, on the cores that the next side needs.
PAUSE_SECONDS = 0.02
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPERATIONS = ("perturb", "update")

Side = Callable[[], object]


def cpu_name() -> str:
    """Return the name of the processor as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """Return the facts about machine and versions that the figures depend on."""
    facts = machine_facts(device) | {
        "cpu": cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "numba": numba.__version__,
        "noise_version": noise.NOISE_VERSION,
    }
    if device == "cuda":
        import triton

        facts["triton"] = triton.__version__
    return facts


def take_turns(sides: dict[str, Side], *, device: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every side in every turn, after one turn that compiles and touches memory."""
    synchronise = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            time.sleep(PAUSE_SECONDS)
            synchronise()
            start = time.perf_counter()
            side()
            synchronise()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _matrix(size: int) -> Region:
    """Return the region of a whole matrix, about square if its size is a power of two."""
    rows = 1 << (size.bit_length() // 2)
    while size % rows:
        rows //= 2
    return Region(0, size, 0, size, shape=(rows, size // rows))


def perturb_sides(size: int, dtype: torch.dtype, kind: NoiseKind, device: str) -> dict[str, Side]:
    """Return the sides of perturb, by name."""
    generator = torch.Generator(device).manual_seed(SEED)
    master = torch.randn(size, generator=generator, device=device)
    target, copied, weights, buffer = (torch.zeros(size, dtype=dtype, device=device) for _ in range(4))
    region = _matrix(size)

    def ours() -> None:
        address = {"seed": SEED, "iteration": 0, "direction": 0}
        noise.perturb(master, target, region=region, sigma=SIGMA, kind=kind, **address)

    def torchs() -> None:
        drawn = torch.randn(size, generator=generator, dtype=dtype, device=device)
        weights.add_(drawn, alpha=SIGMA)

    def buffered() -> None:
        torch.randn(size, generator=generator, dtype=dtype, device=device, out=buffer)
        weights.add_(buffer, alpha=SIGMA)

    return {"shardes": ours, "torch": torchs, "buffered": buffered, "copy": lambda: copied.copy_(master)}


def update_sides(
    size: int, dtype: torch.dtype, kind: NoiseKind, device: str, directions: int
) -> dict[str, Side]:
    """Return the sides of update; torch's master is always float32, as a narrow one could not add up."""
    generator = torch.Generator(device).manual_seed(SEED)
    master = torch.zeros(size, dtype=dtype, device=device)
    copied = torch.zeros_like(master)
    weights, buffer = (torch.zeros(size, device=device) for _ in range(2))
    region = _matrix(size)

    def ours() -> None:
        noise.accumulate(
            master,
            region=region,
            coefficients=[COEFFICIENT] * directions,
            directions=range(directions),
            seed=SEED,
            iteration=0,
            kind=kind,
        )

    def torchs() -> None:
        for _ in range(directions):
            weights.add_(torch.randn(size, generator=generator, device=device).mul_(COEFFICIENT))

    def buffered() -> None:
        for _ in range(directions):
            torch.randn(size, generator=generator, device=device, out=buffer)
            weights.add_(buffer.mul_(COEFFICIENT))

    sides: dict[str, Side] = {"shardes": ours, "torch": torchs, "buffered": buffered}
    sides["copy"] = lambda: copied.copy_(master)
    if device == "cpu" and kind == GAUSSIAN and torch.get_num_threads() == 1:
        words = np.arange(directions, dtype=np.uint32) << np.uint32(8)
        sides["raw"] = lambda: _raw(size // BLOCK, words, u32(0), u32(0), u32(SEED), u32(0))
    return sides


@numba.njit(error_model="numpy")
def _raw(num_blocks, directions, c1, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Compute Philox and Box-Muller alone; the sum keeps the compiler from leaving anything out."""
    total = np.zeros(BLOCK, np.float32)
    for block in range(num_blocks):
        for n in range(0, directions.size - 1, 2):
            word0, word1 = directions[n], directions[n + 1]
            for lane in range(LANES):
                call = u32(u32(block * LANES) + u32(lane))
                first, second = eight_normals(call, word0, call, word1, c1, c3, k0, k1)
                total[lane] += first[0] + second[0]
                total[LANES + lane] += first[1] + second[1]
                total[2 * LANES + lane] += first[2] + second[2]
                total[3 * LANES + lane] += first[3] + second[3]
    return f32(total.sum())


def digest_sides(size: int, dtype: torch.dtype, device: str) -> dict[str, Side]:
    """Return the sides of digest; torch has none."""
    master = torch.randn(size, device=device).to(dtype)
    copied, total = torch.zeros_like(master), torch.zeros(1, dtype=torch.int64, device=device)
    region = Region(0, size, 0, size)
    return {
        "shardes": lambda: add_digest(total, master, region=region),
        "copy": lambda: copied.copy_(master),
    }


def measure(
    operation: str,
    dtype: torch.dtype,
    kind: NoiseKind,
    *,
    size: int,
    device: str,
    directions: int,
    threads: int,
    repeats: int,
) -> Row:
    """Measure one row of the table; speeds are in elements of noise a second: elements times directions."""
    torch.set_num_threads(threads)
    if operation == "update":
        sides = update_sides(size, dtype, kind, device, directions)
    else:
        directions = 1
        is_digest = operation == "digest"
        sides = digest_sides(size, dtype, device) if is_digest else perturb_sides(size, dtype, kind, device)
    seconds = take_turns(sides, device=device, repeats=repeats)
    row: Row = {
        "operation": operation,
        "kind": str(kind),
        "dtype": str(dtype).removeprefix("torch."),
        "directions": directions,
        "threads": threads,
        "elements": size,
        "seconds": seconds,
    }
    for name, pick in (("best", min), ("median", statistics.median)):
        picked = {side: pick(turns) for side, turns in seconds.items()}
        ours = picked["shardes"]
        row[name] = {"elements_per_second": size * directions / ours, "share_of_copy": picked["copy"] / ours}
        for side, figure in (("torch", "ratio_to_torch"), ("buffered", "ratio_to_buffered")):
            row[name][figure] = picked[side] / ours if side in picked else None
        row[name]["times_raw"] = ours / picked["raw"] if "raw" in picked else None
    return row


HEADER = (
    "operation  noise       dtype     directions  threads |    M/s | torch  buffered | of a copy | times raw"
)


def formatted(row: Row) -> str:
    """Format a row under ``HEADER``: the best turns."""

    def number(value: float | None, width: int) -> str:
        return " " * width if value is None else f"{value:>{width}.2f}"

    best = row["best"]
    return (
        f"{row['operation']:<10} {row['kind']:<11} {row['dtype']:<9} {row['directions']:>10}"
        f"  {row['threads']:>7} | {best['elements_per_second'] / 1e6:>6.0f}"
        f" | {number(best['ratio_to_torch'], 5)}  {number(best['ratio_to_buffered'], 8)}"
        f" | {best['share_of_copy']:>9.0%} | {number(best['times_raw'], 9)}"
    )


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--elements", type=click.IntRange(min=1), default=2**24, show_default=True)
@click.option(
    "--directions",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Of the update, in one pass.",
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
    *,
    device: str,
    elements: int,
    directions: int,
    threads: tuple[int, ...],
    repeats: int,
    json_path: Path | None,
) -> None:
    """Measure the noise against torch and against a copy."""
    facts = environment(device)
    show(facts)
    click.echo(
        f"\n{elements} elements; the best of {repeats} turns; M/s: million elements of noise a second;"
        "\ntorch, buffered: its time over ours; of a copy: its time over ours, for all directions together;"
        "\ntimes raw: our time over that of Philox and Box-Muller alone\n"
    )
    click.echo(HEADER)
    rows = []
    kinds = (GAUSSIAN, Rademacher())
    cases = [(operation, dtype, kind) for kind in kinds for operation in OPERATIONS for dtype in DTYPES]
    # The digest knows no kind.
    cases += [("digest", dtype, GAUSSIAN) for dtype in DTYPES]
    for num_threads in threads or ((1, num_cores()) if device == "cpu" else (1,)):
        for operation, dtype, kind in cases:
            row = measure(
                operation,
                dtype,
                kind,
                size=elements,
                device=device,
                directions=directions,
                threads=num_threads,
                repeats=repeats,
            )
            rows.append(row)
            click.echo(formatted(row))
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
