"""Test the noise as generators of random numbers are tested, and print the table of docs/noise.md.

Each row has a statistic of many elements, its value under the ideal law, and their difference in standard
deviations of the statistic. Values beyond 5 would be a defect.

    python tools/noise_statistics.py --elements 100000000
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from shardes import noise
from shardes.noise import GAUSSIAN, NoiseKind, Rademacher, Region

# Moments of the normal law by order, and the variance of one element's power.
_MOMENTS = {1: (0.0, 1.0), 2: (1.0, 2.0), 3: (0.0, 15.0), 4: (3.0, 96.0), 6: (15.0, 10170.0)}
_TAILS = (2.0, 3.0, 4.0, 5.0, 6.0)
# Within a quarter of a block, between quarters (which share a call), between blocks, and further.
_LAGS = (1, 2, 3, 15, 16, 17, 32, 48, 63, 64, 65, 128, 1024, 2048)
_STEP = 1 << 22
_HOME: dict[str, int] = {"seed": 20250924, "iteration": 5, "direction": 3, "param_id": 11}
_NEIGHBOURS: dict[str, dict[str, int]] = {
    "the next seed": {"seed": 20250925},
    "a seed 2^32 further": {"seed": 20250924 + 2**32},
    "the next iteration": {"iteration": 6},
    "the next direction": {"direction": 4},
    "the next parameter": {"param_id": 12},
    "direction and parameter swapped": {"direction": 11, "param_id": 3},
    "iteration and direction swapped": {"iteration": 3, "direction": 5},
}


@dataclass(frozen=True)
class Row:
    """Statistic; ``deviations`` is its distance from the ideal, in standard deviations of the statistic."""

    name: str
    found: float
    ideal: float
    deviations: float


def sample(kind: NoiseKind, start: int, length: int, **changes: int) -> NDArray[np.float32]:
    """Compute the noise of elements [start, start + length) of a large parameter, by the CPU kernel."""
    address: dict[str, Any] = {**_HOME, **changes}
    region = Region(address.pop("param_id"), 2**34, start, length)
    centre, eps = torch.zeros(length), torch.empty(length)
    noise.perturb(centre, eps, region=region, sigma=1.0, kind=kind, **address)
    return eps.numpy()


def _parts(num_elements: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_elements, _STEP):
        yield start, min(_STEP, num_elements - start)


def moments_and_tails(num_elements: int) -> list[Row]:
    """Measure moments, and counts beyond some sizes, over ``num_elements`` normals."""
    sums, counts = dict.fromkeys(_MOMENTS, 0.0), dict.fromkeys(_TAILS, 0)
    for start, length in _parts(num_elements):
        values = sample(GAUSSIAN, start, length).astype(np.float64)
        for order in sums:
            sums[order] += float((values**order).sum())
        for tail in counts:
            counts[tail] += int((np.abs(values) > tail).sum())
    rows = []
    for order, (ideal, variance) in _MOMENTS.items():
        mean = sums[order] / num_elements
        deviations = (mean - ideal) / math.sqrt(variance / num_elements)
        rows.append(Row(f"mean of eps^{order}", mean, ideal, deviations))
    for tail in _TAILS:
        ideal = num_elements * math.erfc(tail / math.sqrt(2))
        deviations = (counts[tail] - ideal) / math.sqrt(ideal)
        rows.append(Row(f"elements beyond {tail:g}", counts[tail], ideal, deviations))
    return rows


def kolmogorov_smirnov(num_elements: int) -> float:
    """Return the largest distance between the empirical and the normal distribution, times sqrt(n).

    In the ideal case it exceeds 1.63 with a probability of 1%, and 1.95 with 0.1%.
    """
    ordered = np.concatenate([sample(GAUSSIAN, *part) for part in _parts(num_elements)])
    ordered.sort()
    largest = 0.0
    for start, length in _parts(num_elements):
        values = torch.from_numpy(ordered[start : start + length]).double()
        ideal = torch.special.ndtr(values).numpy()
        rank = np.arange(start, start + length, dtype=np.float64)
        above, below = (rank + 1) / num_elements - ideal, ideal - rank / num_elements
        largest = max(largest, float(above.max()), float(below.max()))
    return largest * math.sqrt(num_elements)


def _correlations(name: str, pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> list[Row]:
    """Correlate two samples in parts, and their squares, where a radius shared by two normals would show."""
    count, plain, squared = 0, 0.0, 0.0
    for a, b in pairs:
        x, y = a.astype(np.float64), b.astype(np.float64)
        count += x.size
        plain += float((x * y).sum())
        squared += float(((x * x - 1) * (y * y - 1)).sum()) / 2
    scale = math.sqrt(count)
    rows = [Row(f"correlation with {name}", plain / count, 0.0, plain / scale)]
    if squared:  # the squares of signs are all 1
        rows.append(Row(f"of the squares with {name}", squared / count, 0.0, squared / scale))
    return rows


def correlations(kind: NoiseKind, num_elements: int) -> list[Row]:
    """Correlate elements with others that share some part of the address with them."""
    rows = []
    for lag in _LAGS:
        pairs = []
        for start, length in _parts(num_elements):
            values = sample(kind, start, length + lag)
            pairs.append((values[:-lag], values[lag:]))
        rows += _correlations(f"element i + {lag}", pairs)
    for name, changes in _NEIGHBOURS.items():
        pairs = [
            (sample(kind, start, length), sample(kind, start, length, **changes))
            for start, length in _parts(num_elements)
        ]
        rows += _correlations(name, pairs)
    return rows


def signs(num_elements: int) -> list[Row]:
    """Measure the balance of Rademacher noise over ``num_elements`` signs."""
    total = sum(float(sample(Rademacher(), *part).sum(dtype=np.float64)) for part in _parts(num_elements))
    return [Row("mean of signs", total / num_elements, 0.0, total / math.sqrt(num_elements))]


@click.command()
@click.option("--elements", type=click.IntRange(min=1), default=10**8, show_default=True)
@click.option(
    "--pairs",
    type=click.IntRange(min=1),
    default=10**7,
    show_default=True,
    help="Elements for each correlation.",
)
def main(*, elements: int, pairs: int) -> None:
    """Print all statistics as a Markdown table."""
    groups = {
        "gaussian": [*moments_and_tails(elements), *correlations(GAUSSIAN, pairs)],
        "rademacher": [*signs(elements), *correlations(Rademacher(), pairs)],
    }
    click.echo("| noise | statistic | found | ideal | standard deviations |\n|---|---|---|---|---|")
    for kind, row in itertools.chain.from_iterable(((k, r) for r in rows) for k, rows in groups.items()):
        click.echo(f"| {kind} | {row.name} | {row.found:.6g} | {row.ideal:.6g} | {row.deviations:+.2f} |")
    click.echo(f"\nKolmogorov-Smirnov: {kolmogorov_smirnov(elements):.3f} / sqrt(n)")


if __name__ == "__main__":
    main()
