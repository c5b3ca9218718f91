"""The rates of the machine, which shares and arithmetic are of."""

import torch

from gpu_check.devices import copy_bytes_per_second, device_of_check, seconds_of
from gpu_check.part import Context


def run(context: Context) -> None:
    """Measure rates of memory, matrix products, launches and copies from the host."""
    device = device_of_check()
    is_gpu = device.type == "cuda"
    context.record(copy_bytes_per_second=copy_bytes_per_second(device))
    size = 8192 if is_gpu else 128
    dtype = torch.bfloat16 if is_gpu else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = seconds_of(lambda: one @ other, num_turns=5, warm_ups=3)
    context.record(matmul_flops_per_second=2 * size**3 / seconds)
    few = torch.zeros(16, device=device)

    def launches() -> None:
        for _ in range(200):
            few.add_(1)

    context.record(launch_seconds=seconds_of(launches, num_turns=5) / 200)
    num_bytes = 2**30 if is_gpu else 2**20
    with context.section("pinned memory"):
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
        target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        to_device = seconds_of(lambda: target.copy_(host, non_blocking=True), num_turns=5)
        to_host = seconds_of(lambda: host.copy_(target, non_blocking=True), num_turns=5)
        context.record(
            host_to_device_bytes_per_second=num_bytes / to_device,
            device_to_host_bytes_per_second=num_bytes / to_host,
        )
