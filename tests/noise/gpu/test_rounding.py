"""Conversions and stochastic rounding in the GPU kernels against their definition, bit for bit."""

import itertools

import pytest
import torch

from shardes.noise import Rademacher, Region
from tests.helpers.noise_oracle import ELEMENTWISE, FORMATS, accumulated
from tests.noise.gpu.checks import ADDRESS, EXTREMES, SIZE, check_accumulate, check_add, check_perturb

pytest.importorskip("triton")


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_exact_for_every_pattern(kernels, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    address = {"seed": 0, "iteration": 0, "direction": 0, "sigma": 0.0}
    region = Region(0, SIZE, 0, every.numel())
    check_perturb(kernels, every, torch.float32, region=region, **address)
    check_perturb(kernels, every, dtype, region=region, **address)
    # Half-way points between neighbours, and what lies beside them; those of the first rounding.
    finite = every[every.isfinite()].double()
    between = ((finite[:-1] + finite[1:]) / 2).float()
    for nudge in (0, 1, -1):
        source = (between.view(torch.int32) + nudge).view(torch.float32)
        region = Region(0, SIZE, 0, source.numel())
        check_perturb(kernels, source, dtype, region=region, **address)


@pytest.mark.parametrize("target_dtype", FORMATS)
def test_perturb_rounds_extremes_as_the_oracle_does(kernels, target_dtype):
    for source_dtype, sigma in itertools.product(FORMATS, (0.0, 1e-41, 1e-3, 3e38, float("inf"))):
        source = EXTREMES.to(source_dtype)
        region = Region(7, SIZE, 11, source.numel())
        check_perturb(kernels, source, target_dtype, region=region, sigma=sigma, direction=2, **ADDRESS)


def test_perturb_breaks_ties_of_the_second_rounding_to_even(kernels):
    # One plus a multiple of the step, plus or minus half a step.
    for dtype, half_step in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        source = 1 + 2 * half_step * torch.arange(1, 120)
        region = Region(7, SIZE, 1, source.numel())
        kind = Rademacher()
        check_perturb(
            kernels, source, dtype, region=region, sigma=half_step, direction=2, kind=kind, **ADDRESS
        )


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_of_every_pattern_equals_the_oracle(kernels, dtype, kind):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    region = Region(7, SIZE, 2**32 - 5, every.numel())
    check_accumulate(kernels, every, region=region, kind=kind, directions=[1], coefficients=[1e-3], **ADDRESS)
    check_add(kernels, every, torch.full((2**16,), 1e-3), region=region, **ADDRESS)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FORMATS)
def test_accumulate_rounds_extremes_as_the_oracle_does(kernels, dtype, kind):
    values = EXTREMES.to(dtype)
    region = Region(7, SIZE, 11, values.numel())
    for coefficients in ([1e-41], [1e-8], [3e4], [3e38, 3e38], [float("inf")]):
        steps = {"directions": list(range(len(coefficients))), "coefficients": coefficients}
        check_accumulate(kernels, values, region=region, kind=kind, **steps, **ADDRESS)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_finite_sum_stays_finite(kernels, dtype, kind):
    limits = torch.finfo(dtype)
    values = torch.full((200,), limits.max, dtype=dtype) * torch.tensor([1, -1], dtype=dtype).repeat(100)
    steps = {"directions": [0], "coefficients": [limits.max * limits.eps / 8]}
    region = Region(7, SIZE, 11, values.numel())
    assert accumulated(values, region=region, kind=kind, **steps, **ADDRESS).isfinite().all()
    check_accumulate(kernels, values, region=region, kind=kind, **steps, **ADDRESS)
