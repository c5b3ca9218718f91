"""Every kernel of noise and digest on the device, bit for bit against the NumPy definition and the CPU's."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gpu_check.devices import device_of_check
from gpu_check.part import Context
from shardes import noise
from shardes.noise import LowRank, Region
from shardes.noise.kinds.gaussian import Gaussian
from shardes.weights.digest import add_digest
from tests.helpers.noise_oracle import ELEMENTWISE, FORMATS, accumulated, perturbed, same_bits
from tests.noise.gpu import checks

SIZE = checks.SIZE
# Odd starts, borders of blocks and of 32-bit numbers, and rows with gaps.
_SHAPES = [(77, 1_000_003, 1, 0), (2**31 - 70_001, 140_003, 1, 0), (2**33 + 900, 333, 300, 2**20 + 1)]
_FEW_SHAPES = [(77, 1500, 1, 0), (2**31 - 70, 30, 9, 2**20 + 1)]
# Shape of a matrix, first element, length, rows, stride: whole, a rank's rows, a rank's columns.
_MATRICES = [
    ((700, 1100), 0, 770_000, 1, 0),
    ((700, 1100), 5000, 300_007, 1, 0),
    ((90, 1100), 300, 550, 90, 1100),
]
_FEW_MATRICES = [((7, 33), 0, 231, 1, 0), ((7, 33), 10, 12, 7, 33)]


@contextlib.contextmanager
def _kernels(device: torch.device) -> Iterator[Any]:
    """Give the kernels' device; on a CPU have noise and digest use them under Triton's interpreter."""
    if device.type == "cuda":
        yield SimpleNamespace(device=device)
        return
    import pytest
    from triton.runtime.interpreter import InterpretedFunction

    import shardes.weights

    modules = checks.interpreted()
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        checks.use_for_cpu(patch, modules)
        patch.setattr(shardes.weights, "digest_cpu", modules.digest_gpu, raising=False)
        patch.setattr(InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
        yield SimpleNamespace(device=device)


class _Counter:
    """Counts comparisons by what is compared, and records those that failed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.num_cases = 0

    def compare(self, name: str, cases: list[Callable[[], None]]) -> None:
        """Run checks that raise AssertionError; those of a name are right if all are."""
        wrong = []
        for case in cases:
            self.num_cases += 1
            try:
                case()
            except AssertionError as error:
                wrong.append(str(error).splitlines()[0] if str(error) else "the bits differ")
        self._context.check(name, not wrong, detail=f"{len(wrong)} of {len(cases)}: {wrong[:3]}")
        self._context.record(num_comparisons=self.num_cases)


def run(context: Context) -> None:
    """Compare every kernel on every dtype with the oracle, then large regions with the CPU's kernels."""
    device = device_of_check()
    few = context.is_rehearsal
    counter = _Counter(context)
    with _kernels(device) as kernels:
        regions = [
            Region(7, SIZE, start, length, rows=rows, stride=stride)
            for start, length, rows, stride in (_FEW_SHAPES if few else _SHAPES)
        ]
        for kind in [*ELEMENTWISE, Gaussian(4)]:
            with context.section(f"oracle {kind!r}"):
                _compare_elementwise(counter, kernels, kind, regions)
        for rank in (1, 4):
            with context.section(f"oracle low_rank {rank}"):
                _compare_low_rank(counter, kernels, LowRank(rank), _FEW_MATRICES if few else _MATRICES)
        with context.section("oracle add and digest"):
            _compare_others(counter, kernels, regions)
    if device.type == "cuda":
        with context.section("cpu's kernels"):
            _compare_large(context, device)


def _values(region: Region, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-2, 2, region.num_elements).to(dtype)


def _compare_elementwise(counter: _Counter, kernels: Any, kind: Any, regions: list[Region]) -> None:
    step = {"sigma": 0.01, "direction": 2, "kind": kind, **checks.ADDRESS}
    pairs = list(itertools.product(FORMATS, FORMATS))

    def perturb(region: Region, source: torch.dtype, target: torch.dtype) -> Callable[[], None]:
        return lambda: checks.check_perturb(kernels, _values(region, source), target, region=region, **step)

    def accumulate(region: Region, dtype: torch.dtype) -> Callable[[], None]:
        told = {"kind": kind, **checks.UPDATE, **checks.ADDRESS}
        return lambda: checks.check_accumulate(kernels, _values(region, dtype), region=region, **told)

    # Every pair of dtypes on the first region, the other regions on one pair.
    cases = [perturb(regions[0], *pair) for pair in pairs]
    cases += [perturb(region, torch.float32, torch.bfloat16) for region in regions[1:]]
    counter.compare(f"perturb {kind!r}", cases)
    cases = [accumulate(regions[0], dtype) for dtype in FORMATS]
    cases += [accumulate(region, torch.bfloat16) for region in regions[1:]]
    counter.compare(f"accumulate {kind!r}", cases)


def _compare_low_rank(counter: _Counter, kernels: Any, kind: LowRank, matrices: list[Any]) -> None:
    device = kernels.device

    def both(place: Any, source_dtype: torch.dtype, target_dtype: torch.dtype) -> Callable[[], None]:
        shape, start, length, rows, stride = place
        size = math.prod(shape)
        region = Region(7, size, start, length, rows=rows, stride=stride, shape=shape)

        def compare() -> None:
            source = _values(region, source_dtype)
            step: dict[str, Any] = {
                "region": region,
                "sigma": 0.01,
                "direction": 2,
                "kind": kind,
                **checks.ADDRESS,
            }
            target = torch.empty(region.num_elements, dtype=target_dtype, device=device)
            noise.perturb(source.to(device), target, **step)
            assert same_bits(target.cpu(), perturbed(source, target_dtype, **step)), f"perturb {region}"
            update: dict[str, Any] = {"region": region, "kind": kind, **checks.UPDATE, **checks.ADDRESS}
            master = source.to(device, copy=True)
            noise.accumulate(master, **update)
            assert same_bits(master.cpu(), accumulated(source, **update)), f"accumulate {region}"

        return compare

    cases = [
        both(matrices[0], dtype, target) for dtype, target in zip(FORMATS, reversed(FORMATS), strict=True)
    ]
    cases += [both(place, torch.float32, torch.bfloat16) for place in matrices[1:]]
    counter.compare(f"perturb and accumulate low_rank, rank {kind.rank}", cases)


def _compare_others(counter: _Counter, kernels: Any, regions: list[Region]) -> None:
    region = regions[0]

    def add(dtype: torch.dtype) -> Callable[[], None]:
        delta = torch.linspace(-3e-3, 3e-3, region.num_elements).flip(0)
        return lambda: checks.check_add(
            kernels, _values(region, dtype), delta, region=region, **checks.ADDRESS
        )

    counter.compare("add", [add(dtype) for dtype in FORMATS])

    def digest(part: Region, dtype: torch.dtype) -> Callable[[], None]:
        def compare() -> None:
            values = _values(part, dtype)
            assert checks.digest_of(kernels, values, part) == checks.reference_digest(values, part), f"{part}"

        return compare

    parts = [Region(7, SIZE, 5, 3001), Region(7, SIZE, 2**31 - 20, 33, rows=9, stride=70)]
    counter.compare("digest", [digest(part, dtype) for part in parts for dtype in FORMATS])


def _compare_large(context: Context, device: torch.device) -> None:
    """Compare with the CPU's kernels, which tests compare with the definition, on a whole large parameter."""
    shape = (3584, 18944)
    size = math.prod(shape)
    region = Region(3, size, 0, size, shape=shape)
    source = torch.randn(size, generator=torch.Generator().manual_seed(0))
    address: dict[str, Any] = {"region": region, "seed": 5, "iteration": 9}
    for kind in [*ELEMENTWISE, Gaussian(4), LowRank(4)]:
        found = []
        for place in (torch.device("cpu"), device):
            values = source.to(place, copy=True)
            target = torch.zeros(size, dtype=torch.bfloat16, device=place)
            noise.perturb(values, target, sigma=1e-3, direction=3, kind=kind, **address)
            noise.accumulate(values, coefficients=[1e-3, -2e-3], directions=[0, 7], kind=kind, **address)
            total = torch.zeros(1, dtype=torch.int64, device=place)
            add_digest(total, values, region=region)
            found.append((target.cpu(), values.cpu(), int(total.item())))
        (target, master, total_of_cpu), (other, other_master, total_of_gpu) = found
        is_same = (
            same_bits(target, other) and same_bits(master, other_master) and total_of_cpu == total_of_gpu
        )
        context.check(f"{size / 1e6:.0f} million elements as on the CPU, {kind!r}", is_same)
