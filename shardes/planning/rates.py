"""The rates of this machine's CPU, measured in about two seconds, and what a process takes of its memory."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shardes import noise
from shardes.config.schema import Config
from shardes.es.update import Perturbation
from shardes.noise.region import Region
from shardes.planning.machine import Machine
from shardes.rollout.memory import free_bytes

# What runs import, and a plan does not: kernels of noise are compiled by numba.
_OF_RUNS = ("shardes.trainer", "shardes.noise.cpu")
# Sizes of the matrix products by which rates are measured: of many rows, and of few, whose weights are read
# once and are more than caches hold.
_INNER, _MANY_ROWS, _FEW_ROWS, _NUM_MATRICES = 2048, 512, 4, 16
_NOISE_ELEMENTS = 1 << 22
_NUM_TURNS = 3


def machine_of(config: Config, *, device_type: str, **known: float | None) -> Machine:
    """Return the device of each rank: a GPU as it is assumed to be, or this CPU as it is measured.

    Args:
        config: Configuration of the run.
        device_type: ``cuda`` or ``cpu``.
        known: Attributes of the machine that are known; None where they are not.
    """
    if device_type == "cpu":
        threads = torch.get_num_threads()
        if config.parallel.threads_per_rank is not None:
            torch.set_num_threads(config.parallel.threads_per_rank)
        machine = measured_machine(getattr(torch, config.model.dtype))
        torch.set_num_threads(threads)
    else:
        machine = Machine(80 * 2**30, device_type)
    values: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
    return replace(machine, **values)


def measured_machine(
    dtype: torch.dtype,
    *,
    memory_bytes: int | None = None,
    reserved_bytes: int = 0,
    num_turns: int = _NUM_TURNS,
) -> Machine:
    """Measure the CPU that this process runs on, with the threads that torch uses.

    Args:
        dtype: Dtype of the model.
        memory_bytes: Memory of a rank; None: what is free here, with what this process has.
        reserved_bytes: Part of it that is left to others.
        num_turns: Number of measurements of each rate, of which the best counts.
    """
    process_bytes = used_bytes()
    if memory_bytes is None:
        memory_bytes = free_bytes(torch.device("cpu")) + process_bytes
    matrices = torch.full((_NUM_MATRICES, _INNER, _INNER), 0.01, dtype=dtype)
    reading, computing = _products(matrices, num_turns)
    small = torch.zeros(1)
    copied = torch.empty_like(matrices)
    return Machine(
        memory_bytes,
        "cpu",
        reserved_bytes,
        process_bytes,
        # A part is copied by the rank that sends it, and twice by one that has it and receives another.
        gather_bytes_per_second=matrices.nbytes / 3 / _best(lambda: copied.copy_(matrices), num_turns),
        memory_bytes_per_second=reading,
        flops_per_second=computing,
        noise_elements_per_second=_noise_rate(dtype, num_turns),
        kernel_seconds=_best(lambda: [small.add(1) for _ in range(100)], num_turns) / 100,
    )


def used_bytes() -> int:
    """Return the memory that this process has taken, once it has imported what runs import."""
    for name in _OF_RUNS:
        import_module(name)
    path = Path("/proc/self/statm")
    if not path.is_file():
        return 0  # not Linux: nothing is known
    return int(path.read_text().split()[1]) * 4096


def _products(matrices: torch.Tensor, num_turns: int) -> tuple[float, float]:
    """Return the bytes of weights that are read in a second, and the operations of large products."""
    few = torch.full((_FEW_ROWS, _INNER), 0.01, dtype=matrices.dtype)
    many = torch.full((_MANY_ROWS, _INNER), 0.01, dtype=matrices.dtype)
    flops = 2 * _INNER * _INNER

    def product(rows: torch.Tensor, count: int) -> Callable[[], object]:
        return lambda: [torch.mm(rows, matrix.t()) for matrix in matrices[:count]]

    large = _best(product(many, 4), num_turns)
    computing = 4 * flops * _MANY_ROWS / large
    seconds = _best(product(few, _NUM_MATRICES), num_turns)
    # The few rows are computed, too.
    seconds = max(seconds - _NUM_MATRICES * flops * _FEW_ROWS / computing, seconds / 2)
    return matrices.nbytes / seconds, computing


def _noise_rate(dtype: torch.dtype, num_turns: int) -> float:
    """Return the elements of Gaussian noise that a perturbation adds in a second."""
    source = torch.zeros(_NOISE_ELEMENTS)
    target = torch.empty(_NOISE_ELEMENTS, dtype=dtype)
    region = Region(0, _NOISE_ELEMENTS, 0, _NOISE_ELEMENTS)

    def perturb() -> None:
        noise.perturb(source, target, region=region, seed=0, **vars(Perturbation(0, 0, 1e-3)))

    perturb()  # compiled, or read from numba's cache
    return _NOISE_ELEMENTS / _best(perturb, num_turns)


def _best(run: Callable[[], object], num_turns: int) -> float:
    """Return the least seconds of some turns: of the processor, so that what others run does not count."""
    least = math.inf
    for _ in range(num_turns):
        start = time.process_time()
        run()
        least = min(least, time.process_time() - start)
    return max(least / torch.get_num_threads(), 1e-9)
