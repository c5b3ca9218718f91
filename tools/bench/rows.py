"""Measure how long it takes to read the columns of a matrix, as ranks of tensor parallelism do.

    python tools/bench/rows.py [--rows 8192] [--columns 7168] [--ranks 8]

It reads one rank's columns from a checkpoint in bfloat16, and from a snapshot that as many ranks wrote: the
same columns, those of half as many ranks, and the whole matrix. Files are in the page cache.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from shardes.models.checkpoint import TensorReader, stored_tensors
from shardes.noise import Region
from shardes.runs.snapshot import SpreadTensor, StoredRegions


def measure(what: str, reader: TensorReader, region: Region, *, rows: int) -> None:
    """Print the least of five times."""
    out, times = torch.empty(region.num_elements), []
    for _ in range(5):
        start = time.perf_counter()
        reader.read("w", region=region, out=out)
        times.append(time.perf_counter() - start)
    print(f"{what:32} {min(times) / rows * 1e6:8.2f} us a row {min(times):8.3f} s")


def main() -> None:
    """Write the files, and read them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 8192), ("columns", 7168), ("ranks", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    rows, columns, ranks = given.rows, given.columns, given.ranks
    torch.set_num_threads(1)
    values = torch.randn(rows, columns).bfloat16()

    def columns_of(rank: int, num_ranks: int) -> Region:
        width = columns // num_ranks
        return Region(0, values.numel(), rank * width, width, rows=rows, stride=columns)

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.safetensors"
        save_file({"w": values}, path)
        parts = []
        for rank in range(ranks):
            region = columns_of(rank, ranks)
            part = Path(scratch) / f"rank{rank}.safetensors"
            save_file({"w": values[:, region.start :][:, : region.length].float().flatten()}, part)
            place = (region.start, region.length, rows, columns)
            parts.append(StoredRegions(stored_tensors(part)["w"], (place,)))
        checkpoint = TensorReader(stored_tensors(path))
        snapshot = TensorReader({"w": SpreadTensor(tuple(parts))})
        measure("checkpoint", checkpoint, columns_of(1, ranks), rows=rows)
        measure("snapshot, same columns", snapshot, columns_of(1, ranks), rows=rows)
        measure("snapshot, half as many ranks", snapshot, columns_of(1, ranks // 2), rows=rows)
        measure("snapshot, whole", snapshot, Region(0, values.numel(), 0, values.numel()), rows=rows)


if __name__ == "__main__":
    main()
