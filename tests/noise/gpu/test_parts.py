"""The GPU kernels of noise that covers a part of the parameters, against its definition, bit for bit."""

import pytest
import torch

from shardes.noise import Rademacher, Region
from shardes.noise.kinds.gaussian import Gaussian
from shardes.noise.parts import LARGE_PARAMETER
from tests.noise.gpu.checks import (
    ADDRESS,
    EMPTY_REGIONS,
    SIZE,
    check_accumulate,
    check_perturb,
    check_restore,
    values_for,
)

pytest.importorskip("triton")

REGIONS = [
    Region(7, LARGE_PARAMETER - 1, 300, 3000),
    Region(7, LARGE_PARAMETER - 1, 100, 700, rows=3, stride=3000),
    Region(7, SIZE, SIZE - 9000, 9000),
    Region(7, SIZE, 2**33 + 3, 130, rows=3, stride=2**24 + 4000),
    *EMPTY_REGIONS,
]
UPDATE = {"directions": [0, 2**24 - 1, 5, 1, 4], "coefficients": [0.5, -0.25, 1e-3, 0.2, 0.1]}


@pytest.mark.parametrize("kind", [Gaussian(3), Rademacher(2)], ids=repr)
def test_every_operation_equals_the_oracle(kernels, kind):
    for region, dtype in zip(REGIONS, 3 * (torch.float32, torch.bfloat16), strict=True):
        source = values_for(region, torch.float32)
        source[::7] = -0.0
        for direction in (0, 1):
            where = {"region": region, "kind": kind, "direction": direction, **ADDRESS}
            check_perturb(kernels, source, dtype, sigma=0.01, **where)
            check_restore(kernels, source, dtype, **where)
        check_accumulate(kernels, values_for(region, dtype), region=region, kind=kind, **UPDATE, **ADDRESS)


def test_rows_may_need_several_launches(kernels, monkeypatch):
    if kernels.device.type == "cpu":
        monkeypatch.setattr(kernels.parts_gpu, "_MAX_PROGRAMS", 3)
    region, kind = Region(7, LARGE_PARAMETER - 1, 100, 700, rows=5, stride=1500), Gaussian(2)
    source = values_for(region, torch.float32)
    check_perturb(kernels, source, source.dtype, region=region, sigma=0.01, direction=1, kind=kind, **ADDRESS)
    check_accumulate(kernels, source, region=region, kind=kind, **UPDATE, **ADDRESS)
