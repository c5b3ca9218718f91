"""Tensors' device, clocks and rates, on a GPU or in a rehearsal."""

import statistics
import time
from collections.abc import Callable

import torch


def device_of_check() -> torch.device:
    """Return the GPU of this process, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def wait_for_device() -> None:
    """Wait until the GPU has done all its work; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], *, num_turns: int = 1, warm_ups: int = 1) -> float:
    """Return the median time of some work, the device's included."""
    found = []
    for turn in range(warm_ups + num_turns):
        wait_for_device()
        start = time.perf_counter()
        work()
        wait_for_device()
        if turn >= warm_ups:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def copy_bytes_per_second(device: torch.device) -> float:
    """Return the rate of a large copy on the device, counting what is read and what is written."""
    size = 2**30 if device.type == "cuda" else 2**22
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), num_turns=7)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes of tensors since ``reset_peak``; 0 without a GPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Begin to look for a peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
