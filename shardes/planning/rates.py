"""The rates of this machine's CPU, measured in about two seconds, and what a process takes of its memory."""

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from shardes import noise
from shardes.backends.registry import BACKENDS
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
_ELEMENTS = 1 << 21
_COLLECTIVE_BYTES = 1 << 22
# Of the processor, for gloo, the hooks that call it and the waits of threads for each other: from runs of
# SmolLM2 (benchmarks/plan-smollm2-cpu.json). What two threads measure is anything from .1 to 1 ms.
COLLECTIVE_SECONDS = 8e-4
_NUM_TURNS = 5


def machine_of(config: Config, *, device_type: str, **known: float | None) -> Machine:
    """Return the device of each rank: a GPU as it is assumed to be, or this CPU as it is measured.

    Args:
        config: Configuration of the run.
        device_type: ``cuda`` or ``cpu``.
        known: Attributes of the machine that are known; None where they are not.
    """
    if device_type == "cpu":
        BACKENDS[config.parallel.backend].load()  # whose libraries a process of the run has
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
        num_turns: Number of measurements of each rate, of which the median counts.
    """
    process_bytes = used_bytes()
    if memory_bytes is None:
        memory_bytes = free_bytes(torch.device("cpu")) + process_bytes
    matrices = torch.full((_NUM_MATRICES, _INNER, _INNER), 0.01, dtype=dtype)
    reading, computing = _products(matrices, num_turns)
    copied = torch.empty_like(matrices)
    return Machine(
        memory_bytes,
        "cpu",
        reserved_bytes,
        process_bytes,
        # A part is copied by the rank that sends it, and twice by one that has it and receives another.
        gather_bytes_per_second=matrices.nbytes / 3 / _median(lambda: copied.copy_(matrices), num_turns),
        collective_bytes_per_second=_collective_rate(num_turns),
        collective_seconds=COLLECTIVE_SECONDS,
        memory_bytes_per_second=reading,
        flops_per_second=computing,
        noise_elements_per_second=_noise_rate(dtype, num_turns),
        attention_flops_per_second=_attention_rate(dtype, num_turns),
        elementwise_bytes_per_second=_elementwise_rate(dtype, num_turns),
        layer_seconds=_layer_seconds(dtype, num_turns),
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

    large = _median(product(many, 4), num_turns)
    computing = 4 * flops * _MANY_ROWS / large
    seconds = _median(product(few, _NUM_MATRICES), num_turns)
    # The few rows are computed, too.
    seconds = max(seconds - _NUM_MATRICES * flops * _FEW_ROWS / computing, seconds / 2)
    return matrices.nbytes / seconds, computing


def _noise_rate(dtype: torch.dtype, num_turns: int) -> float:
    """Return the elements of Gaussian noise that a perturbation adds in a second."""
    source = torch.zeros(_ELEMENTS)
    target = torch.empty(_ELEMENTS, dtype=dtype)
    region = Region(0, _ELEMENTS, 0, _ELEMENTS)

    def perturb() -> None:
        noise.perturb(source, target, region=region, seed=0, **vars(Perturbation(0, 0, 1e-3)))

    perturb()  # compiled, or read from numba's cache
    return _ELEMENTS / _median(perturb, num_turns)


def _collective_rate(num_turns: int) -> float:
    """Return the bytes that a rank receives in a second when it gathers with another one.

    The two are threads of this process, which gather by gloo as processes do.
    """
    store, groups = dist.HashStore(), dict[int, Any]()
    local = torch.zeros(_COLLECTIVE_BYTES, dtype=torch.uint8)
    outputs = [[torch.empty_like(local) for _ in range(2)] for _ in range(2)]

    def on_both(run: Callable[[int], object]) -> None:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def make_group(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60))

    def gather(rank: int) -> None:
        groups[rank].allgather([outputs[rank]], [local]).wait()

    on_both(make_group)
    of_both = _median(functools.partial(on_both, gather), num_turns) * torch.get_num_threads()
    return _COLLECTIVE_BYTES / (of_both / 2)


def _attention_rate(dtype: torch.dtype, num_turns: int) -> float:
    """Return the operations of attention in a second, of 8 masked rows with 8 heads."""
    size = 64
    heads = torch.full((8, 8, size, size), 0.01, dtype=dtype)
    mask = torch.ones(8, 1, size, size, dtype=torch.bool).tril()

    def attend() -> None:
        nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    return 4 * heads.numel() * size / _median(attend, num_turns)


def _elementwise_rate(dtype: torch.dtype, num_turns: int) -> float:
    """Return the bytes that a gated activation, the largest such operation, reads and writes in a second."""
    values = torch.full((_ELEMENTS,), 0.5, dtype=dtype)
    return 5 * values.nbytes / _median(lambda: nn.functional.silu(values) * values, num_turns)


def _layer_seconds(dtype: torch.dtype, num_turns: int) -> float:
    """Return the seconds of a layer of transformers that has next to nothing to compute."""
    seconds = []
    for num_layers in (2, 10):
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_hidden_layers=num_layers,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        tokens = torch.zeros(1, 1, dtype=torch.int64)

        def step(model: nn.Module = model, tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                for _ in range(10):
                    model(tokens)

        seconds.append(_median(step, num_turns) / 10)
    return max(seconds[1] - seconds[0], 1e-6) / 8


def _median(run: Callable[[], object], num_turns: int) -> float:
    """Return the median seconds of some turns: of the processor, so that a wait for it does not count."""
    turns = []
    for _ in range(num_turns):
        start = time.process_time()
        run()
        turns.append(time.process_time() - start)
    return max(median(turns) / torch.get_num_threads(), 1e-9)
