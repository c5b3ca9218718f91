"""The GPU kernels of the noise against its definition, bit for bit: every region, every format."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardes import noise
from shardes.noise import Region, definition
from shardes.noise.definition import BLOCK, LANES, MAX_PARAM_ID, Stream
from tests.helpers.noise_oracle import ELEMENTWISE, FORMATS, accumulated, perturbed, same_bits
from tests.noise.gpu.checks import (
    ADDRESS,
    EMPTY_REGIONS,
    FEW_REGIONS,
    REGIONS,
    SIZE,
    UPDATE,
    Framed,
    check_accumulate,
    check_add,
    check_perturb,
    values_for,
)

pytest.importorskip("triton")


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(FORMATS, FORMATS)))
def test_perturb_equals_the_oracle(kernels, source_dtype, target_dtype, kind):
    for region in FEW_REGIONS:
        source = values_for(region, source_dtype)
        check_perturb(
            kernels, source, target_dtype, region=region, sigma=0.01, direction=2, kind=kind, **ADDRESS
        )


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FORMATS)
def test_accumulate_equals_the_oracle(kernels, dtype, kind):
    for region in FEW_REGIONS:
        check_accumulate(kernels, values_for(region, dtype), region=region, kind=kind, **UPDATE, **ADDRESS)


@pytest.mark.parametrize("dtype", FORMATS)
def test_add_equals_the_oracle(kernels, dtype):
    for region in [*FEW_REGIONS, *(REGIONS if dtype == torch.bfloat16 else EMPTY_REGIONS)]:
        delta = values_for(region, torch.float32, limit=3e-3).flip(0)
        check_add(kernels, values_for(region, dtype), delta, region=region, **ADDRESS)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FORMATS)
def test_adding_a_float32_sum_is_accumulating(kernels, dtype, kind):
    for region in FEW_REGIONS:
        values = values_for(region, dtype)
        master, delta = Framed(values, kernels.device), Framed(torch.zeros(values.numel()), kernels.device)
        noise.accumulate(delta.values, region=region, kind=kind, **UPDATE, **ADDRESS)
        noise.add(master.values, delta.values, region=region, **ADDRESS)
        wanted = accumulated(values, region=region, kind=kind, **UPDATE, **ADDRESS)
        assert same_bits(master.result(), wanted), region


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_every_region_gives_the_oracles_bits(kernels, kind):
    steps = {"directions": [3], "coefficients": [0.3]}
    for region in REGIONS:
        source = values_for(region, torch.float32)
        check_perturb(
            kernels, source, source.dtype, region=region, sigma=0.01, direction=2, kind=kind, **ADDRESS
        )
        check_accumulate(kernels, source.bfloat16(), region=region, kind=kind, **steps, **ADDRESS)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize(
    "region", [Region(3, SIZE, 77, 100_001), Region(3, SIZE, 2**33 + 900, 333, rows=300, stride=2**20 + 1)]
)
def test_a_large_region_gives_the_oracles_bits(kernels, region, kind):
    source = torch.randn(region.num_elements, generator=torch.Generator().manual_seed(0))
    check_perturb(
        kernels, source, torch.bfloat16, region=region, sigma=0.01, direction=2, kind=kind, **ADDRESS
    )
    for values in (source, source.bfloat16()):
        check_accumulate(kernels, values, region=region, kind=kind, **UPDATE, **ADDRESS)
    check_add(kernels, source.bfloat16(), source.flip(0), region=region, **ADDRESS)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**64 - 1),
    iteration=st.integers(0, 2**32 - 1),
    direction=st.integers(0, 2**24 - 1),
    param_id=st.integers(0, MAX_PARAM_ID),
    start=st.integers(0, SIZE - 9000),
    length=st.integers(0, 200),
    rows=st.integers(0, 4),
    gap=st.integers(0, 2000),
    kind=st.sampled_from(ELEMENTWISE),
    formats=st.tuples(st.sampled_from(FORMATS), st.sampled_from(FORMATS)),
)
def test_any_address_gives_the_oracles_bits(
    kernels, seed, iteration, direction, param_id, start, length, rows, gap, kind, formats
):
    region = Region(param_id, SIZE, start, length, rows=rows, stride=length + gap)
    address = {"seed": seed, "iteration": iteration, "region": region, "kind": kind}
    source = torch.full((rows * length,), -0.01, dtype=formats[0])
    check_perturb(kernels, source, formats[1], sigma=1.0, direction=direction, **address)
    check_accumulate(kernels, source, directions=[direction], coefficients=[0.3], **address)


def test_rows_may_need_several_launches(kernels, monkeypatch):
    monkeypatch.setattr(kernels.gpu, "_MAX_SLOTS", 7)
    region = Region(7, SIZE, 2030, 33, rows=9, stride=70)
    source = values_for(region, torch.float32)
    check_perturb(kernels, source, torch.float16, region=region, sigma=0.01, direction=2, **ADDRESS)
    check_accumulate(kernels, source, region=region, **UPDATE, **ADDRESS)
    check_add(kernels, source.half(), source, region=region, **ADDRESS)


def test_nothing_to_do_and_nothing_to_add(kernels):
    for region in EMPTY_REGIONS:
        nothing = torch.empty(0)
        check_perturb(kernels, nothing, torch.bfloat16, region=region, sigma=0.01, direction=2, **ADDRESS)
        check_accumulate(kernels, nothing, region=region, **UPDATE, **ADDRESS)
    # Without a direction the sum is +0, which makes -0 +0 and leaves the rest.
    region = Region(7, SIZE, 5, 70)
    for dtype, kind in itertools.product(FORMATS, ELEMENTWISE):
        values = torch.cat([torch.tensor([-0.0]), torch.linspace(-3, 3, 69)]).to(dtype)
        check_accumulate(kernels, values, region=region, kind=kind, directions=[], coefficients=[], **ADDRESS)


def test_the_order_of_the_sum_is_the_order_given(kernels):
    # 2**24 + x - 2**24 keeps whole numbers only: another order gives other bits.
    region = Region(7, SIZE, 0, 200)
    for kind, directions in itertools.product(ELEMENTWISE, ([1, 2, 1], [2, 1, 1], [1, 1, 2])):
        scales = {1: [2.0**24, -(2.0**24)], 2: [1.7]}
        coefficients = [scales[direction].pop(0) for direction in directions]
        check_accumulate(
            kernels,
            torch.zeros(200),
            region=region,
            kind=kind,
            directions=directions,
            coefficients=coefficients,
            **ADDRESS,
        )


def address_of(words, seed):
    """An element, iteration, direction and parameter whose normals come from a call with these two words.

    Philox is a bijection, so it runs backwards from the four words. Among the other two words, some lead to
    a counter that has zeros where a counter of normals must have them.
    """
    key = np.array(definition.seed_key(seed), np.uint64)
    steps = np.array([definition.PHILOX_W0, definition.PHILOX_W1], np.uint64)
    low = np.uint64(2**32 - 1)
    inverse0, inverse1 = (np.uint64(pow(m, -1, 2**32)) for m in (definition.PHILOX_M0, definition.PHILOX_M1))
    rest = np.random.default_rng(0).integers(0, 2**32, (2, 400_000), np.uint64)
    c0, c1, c2, c3 = np.full_like(rest[0], words[0]), np.full_like(rest[0], words[1]), *rest
    for step in reversed(range(definition.PHILOX_ROUNDS)):
        k0, k1 = (key + np.uint64(step) * steps) & low
        old0, old2 = c3 * inverse0 & low, c1 * inverse1 & low
        c1 = (old2 * np.uint64(definition.PHILOX_M1) >> np.uint64(32)) ^ c0 ^ k0
        c3 = (old0 * np.uint64(definition.PHILOX_M0) >> np.uint64(32)) ^ c2 ^ k1
        c0, c2 = old0, old2
    found = np.flatnonzero((c1 % 256 == 0) & (c2 % 256 == 0))[0]
    call, param_id, direction, iteration = (
        int(c[found]) >> n for c, n in zip((c0, c1, c2, c3), (0, 8, 8, 0), strict=True)
    )
    return call // LANES * BLOCK + call % LANES, iteration, direction, param_id


def test_the_extreme_words_give_the_oracles_bits(kernels):
    radii = [0, 1, 2**31 - 1, 2**31, 2**32 - 2**8, 2**32 - 1]
    quarter_turns = [2**29, 3 * 2**29, 5 * 2**29, 7 * 2**29]
    angles = [0, 2**30, 2**31, 2**32 - 1, *quarter_turns, *(turn - 1 for turn in quarter_turns)]
    for n, angle in enumerate(angles):
        words = radii[n % len(radii)], angle
        element, iteration, direction, param_id = address_of(words, seed=11)
        address = {"seed": 11, "iteration": iteration, "direction": direction}
        call = definition.element_words(
            **address, param_id=param_id, stream=Stream.GAUSSIAN, start=element, length=1
        )
        assert tuple(call[:2, 0, element % LANES]) == words
        region = Region(param_id, SIZE, element, LANES + 1)
        check_perturb(kernels, torch.zeros(LANES + 1), torch.float32, region=region, sigma=1.0, **address)


def test_a_radius_of_zero_is_positive_zero(kernels):
    # u rounds to 1 in one call of 2**25; this address is such a one.
    region = Region(0, SIZE, 99850920, 1)
    address = {"seed": 0, "iteration": 0, "direction": 0, "region": region, "sigma": 1.0}
    assert perturbed(torch.zeros(1), torch.float32, **address) == 0
    check_perturb(kernels, torch.tensor([-0.0]), torch.float32, **address)
