"""Throughput of noise, updates and digests, as shares of a copy of the same bytes: tools/bench/noise.py."""

import noise as bench
import torch

from gpu_check.devices import device_of_check
from gpu_check.part import Context
from shardes.noise import GAUSSIAN, LowRank, NoiseKind, Rademacher


def run(context: Context) -> None:
    """Measure perturb, update and digest on the dtypes of masters and models."""
    device = device_of_check()
    size, repeats = (2**28, 5) if device.type == "cuda" else (2**14, 1)
    directions = 30 if device.type == "cuda" else 2
    wide, narrow = torch.float32, torch.bfloat16
    cases: list[tuple[str, torch.dtype, NoiseKind]]
    cases = [(operation, dtype, GAUSSIAN) for operation in bench.OPERATIONS for dtype in (narrow, wide)]
    cases += [(operation, narrow, Rademacher()) for operation in bench.OPERATIONS]
    cases += [(operation, narrow, LowRank(1)) for operation in bench.OPERATIONS]
    cases += [("digest", wide, GAUSSIAN)]
    for operation, dtype, kind in cases:
        name = operation if operation == "digest" else f"{operation}_{kind}".replace(" ", "_")
        name = f"{name}_{str(dtype).removeprefix('torch.')}"
        with context.section(name):
            row = bench.measure(
                operation,
                dtype,
                kind,
                size=size,
                device=device.type,
                directions=directions,
                threads=2,  # with one thread of a CPU another side is compiled, which takes long
                repeats=repeats,
            )
            median = row["median"]
            context.record(
                **{
                    f"{name}_elements_per_second": median["elements_per_second"],
                    f"{name}_share_of_copy": median["share_of_copy"],
                }
            )
            if median["ratio_to_torch"]:
                context.record(**{f"{name}_times_torch": median["ratio_to_torch"]})
