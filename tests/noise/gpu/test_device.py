"""What can be seen on a CUDA device only."""

from types import SimpleNamespace

import pytest
import torch

from shardes import noise
from shardes.noise import Region
from shardes.noise.definition import MAX_PARAM_ID
from shardes.weights.digest import add_digest
from tests.helpers.noise_oracle import ELEMENTWISE, accumulated, perturbed, same_bits
from tests.noise.gpu.checks import (
    ADDRESS,
    HAS_CUDA,
    SIZE,
    UPDATE,
    check_accumulate,
    check_perturb,
    digest_of,
    reference_digest,
    values_for,
)

pytest.importorskip("triton")


def use_all(device, region, values, *, sigma=0.01, iteration=0, directions=(0, 1), dtype=torch.bfloat16):
    target, narrow, master = torch.empty_like(values, dtype=dtype), values.to(dtype), values.clone()
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for kind in ELEMENTWISE:
        address = {"seed": iteration * 2**40, "iteration": iteration, "region": region, "kind": kind}
        noise.perturb(values, target, sigma=sigma, direction=directions[-1], **address)
        for moved in (narrow, master):
            noise.accumulate(moved, coefficients=[0.1] * len(directions), directions=directions, **address)
    noise.add(narrow, master, region=region, seed=iteration * 2**40, iteration=iteration)
    add_digest(total, master, region=region)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_kernels_are_compiled_once():
    from shardes.noise import gpu
    from shardes.weights import digest_gpu

    def num_compiled():
        kernels = (gpu._perturb, gpu._accumulate, gpu._add, digest_gpu._digest)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    device = torch.device("cuda")
    memory = torch.randn(2**20, device=device)
    for region in (Region(1, SIZE, 0, 4096), Region(1, SIZE, 0, 64, rows=64, stride=128)):
        use_all(device, region, memory[: region.num_elements])
    before = num_compiled()
    cases = [(0, 1, 1), (1, 16, 1), (3, 17, 1), (2**31, 1000, 1), (SIZE - 5000, 5000, 1), (16, 1, 16)]
    cases += [(5, 7, 3), (2**33, 16, 16), (16, 640, 1600)]
    for n, (start, length, rows) in enumerate(cases):
        region = Region((n * 7919 * 2**10) % MAX_PARAM_ID, SIZE, start, length, rows=rows, stride=length + n)
        values = memory[n : n + region.num_elements]
        directions = [n, 2**24 - 1 - n, *range(n)]
        use_all(
            device, region, values, sigma=n / 100, iteration=2**32 - 1 - 16**n % 2**32, directions=directions
        )
    assert num_compiled() == before


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_the_kernels_neither_wait_for_the_device_nor_take_memory_of_it():
    device = torch.device("cuda")
    region = Region(1, SIZE, 3, 10_000_000)
    values = torch.randn(region.num_elements, device=device)
    target, narrow = values.half(), values.bfloat16()
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for check in (False, True):  # the first time, Triton compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error" if check else "default")
        try:
            for kind in ELEMENTWISE:
                address = {"seed": 1, "iteration": 2 + check, "region": region, "kind": kind}
                noise.perturb(values, target, sigma=0.01, direction=0, **address)
                noise.accumulate(narrow, coefficients=[0.1 + check], directions=[0], **address)
            noise.add(narrow, values, region=region, seed=1, iteration=2 + check)
            add_digest(total, narrow, region=region)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before < 2**16


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_more_than_two_to_the_31_elements(kind):
    size, tail = 2**31 + 2**20 + 77, 5000
    if torch.cuda.mem_get_info()[0] < 6 * size:
        pytest.skip("needs 13 GB of free device memory")
    device, start = torch.device("cuda"), 2**33 - 3
    source = torch.full((size,), 0.75, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    address = {"kind": kind, **ADDRESS}
    noise.perturb(source, target, region=Region(2, SIZE, start, size), sigma=0.5, direction=4, **address)
    noise.accumulate(source, region=Region(2, SIZE, start, size), **UPDATE, **address)
    for low in (0, 2**31 - tail // 2, size - tail):
        part = Region(2, SIZE, start + low, tail)
        centre = torch.full((tail,), 0.75, dtype=torch.bfloat16)
        wanted = perturbed(centre, torch.bfloat16, region=part, sigma=0.5, direction=4, **address)
        assert same_bits(target[low : low + tail].cpu(), wanted)
        assert same_bits(
            source[low : low + tail].cpu(), accumulated(centre, region=part, **UPDATE, **address)
        )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_of_another_device_than_the_current_one():
    device, region = torch.device("cuda", 1), Region(7, SIZE, 5, 3000)
    kernels = SimpleNamespace(device=device)
    with torch.cuda.device(0):
        source = values_for(region, torch.float32)
        check_perturb(kernels, source, torch.bfloat16, region=region, sigma=0.01, direction=2, **ADDRESS)
        check_accumulate(kernels, source, region=region, **UPDATE, **ADDRESS)
        assert digest_of(kernels, source, region) == reference_digest(source, region)
