"""The noise: golden vectors, the kernels against the oracle bit for bit, and accuracy."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.noise import NOISE_VERSION, accumulate, cpu, perturb, portable
from shardes.noise import definition as noise

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
SPANS = [(0, 0), (0, 1), (5, 1), (0, 63), (1, 63), (0, 64), (63, 2), (0, 65), (7, 500), (2**33 + 3, 130)]
FORMATS = [torch.float32, torch.bfloat16, torch.float16]


def eps(start, length, **address):
    address = {"seed": 2**40 + 5, "iteration": 3, "direction": 2, "param_id": 7} | address
    return noise.normals(start=start, length=length, **address)


def same_bits(a, b):
    width = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(width), b.contiguous().view(width))


def test_philox_gives_the_vectors_published_by_its_authors():
    # Random123's known-answer tests for philox4x32-10: zeros, ones, and digits of pi.
    cases = [
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, wanted in cases:
        words = noise.philox(np.array(counter, np.uint32)[:, None], tuple(key))
        assert words[:, 0].tolist() == wanted


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=str)
def test_the_definition_has_not_drifted(case):
    assert GOLDEN["noise_version"] == NOISE_VERSION
    address = {k: v for k, v in case.items() if k != "bits"}
    assert [f"{bits:08x}" for bits in noise.normals(**address).view(np.uint32)] == case["bits"]


@pytest.mark.parametrize("implementation", [cpu, portable])
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(FORMATS, FORMATS)))
def test_perturb_equals_the_oracle(implementation, source_dtype, target_dtype):
    for start, length in SPANS:
        source = torch.linspace(-2, 2, length).to(source_dtype)
        before = source.clone()
        target = torch.full((length,), 9.0).to(target_dtype)
        words = (7 << 8, 2 << 8, 3)
        implementation.perturb(source, target, start=start, sigma=0.01, words=words, key=(5, 2**8))
        step = torch.from_numpy(np.float32(0.01) * eps(start, length))
        assert same_bits(target, (source.to(target_dtype).float() + step).to(target_dtype))
        assert same_bits(source, before)


@pytest.mark.parametrize("implementation", [cpu, portable])
def test_accumulate_equals_the_oracle(implementation):
    directions, coefficients = [0, 5, 2, 9], [0.5, -0.25, 1e-3, 0.0]
    for start, length in SPANS:
        master = torch.linspace(-1, 1, length)
        wanted = master.clone()
        total = np.zeros(length, np.float32)
        for direction, coefficient in zip(directions, coefficients, strict=True):
            total = total + np.float32(coefficient) * eps(start, length, direction=direction)
        wanted += torch.from_numpy(total)
        words = [direction << 8 for direction in directions]
        implementation.accumulate(
            master,
            start=start,
            coefficients=coefficients,
            word1=7 << 8,
            direction_words=words,
            word3=3,
            key=(5, 2**8),
        )
        assert same_bits(master, wanted)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    iteration=st.integers(0, noise.MAX_ITERATION),
    direction=st.integers(0, noise.MAX_DIRECTION),
    param_id=st.integers(0, noise.MAX_PARAM_ID),
    start=st.integers(0, 2**41),
    length=st.integers(0, 200),
)
def test_any_address_gives_the_oracles_bits(seed, iteration, direction, param_id, start, length):
    address = {"seed": seed, "iteration": iteration, "direction": direction, "param_id": param_id}
    target = torch.empty(length)
    perturb(torch.full((length,), -0.0), target, sigma=1.0, start=start, **address)
    wanted = np.float32(-0.0) + noise.normals(start=start, length=length, **address)
    assert same_bits(target, torch.from_numpy(wanted))


def test_a_run_does_not_depend_on_where_it_is_cut():
    whole = eps(0, 1000)
    for cut in (1, 16, 63, 64, 65, 500):
        assert np.array_equal(np.concatenate([eps(0, cut), eps(cut, 1000 - cut)]), whole)


def test_threads_do_not_change_a_bit():
    source = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    results = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            target, master = torch.empty_like(source), source.clone()
            address = {"seed": 1, "iteration": 0, "param_id": 0, "start": 77}
            perturb(source, target, sigma=0.1, direction=0, **address)
            accumulate(master, coefficients=[0.1, 0.2], directions=[0, 1], **address)
            results.append((target, master))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_every_part_of_the_address_changes_the_noise():
    base = {"seed": 1, "iteration": 1, "direction": 1, "param_id": 1}
    reference = noise.normals(start=0, length=4096, **base)
    for other in (*({**base, k: 2} for k in base), {**base, "seed": 1 + 2**32}):
        correlation = np.corrcoef(reference, noise.normals(start=0, length=4096, **other))[0, 1]
        assert abs(correlation) < 0.06  # four standard deviations


def test_float16_and_bfloat16_conversions_are_exact_for_every_pattern():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        finite = values[torch.isfinite(values.float())]
        wide = torch.empty(finite.numel())
        address = {"seed": 0, "iteration": 0, "direction": 0, "param_id": 0, "start": 0}
        perturb(finite, wide, sigma=0.0, **address)
        step = torch.from_numpy(np.float32(0) * noise.normals(length=finite.numel(), **address))
        assert same_bits(wide, finite.float() + step)
        # Half-way points and their neighbours, overflow to infinity, subnormals.
        between = (finite.float()[:-1].double() + finite.float()[1:].double()).div(2).float()
        for nudge in (0, 1, -1):
            source = (between.view(torch.int32) + nudge).view(torch.float32)
            narrow = torch.empty(source.numel(), dtype=dtype)
            perturb(source, narrow, sigma=0.0, **address)
            step = torch.from_numpy(np.float32(0) * noise.normals(length=source.numel(), **address))
            assert same_bits(narrow, (source.to(dtype).float() + step).to(dtype))


def exact_normals(radius_bits, angle_bits):
    """Box-Muller in float64 from the same uniforms."""
    u = noise.radius_uniform(radius_bits).astype(np.float64)
    quadrant, turns = noise.angle_uniform(angle_bits)
    angle = 2 * np.pi * (quadrant / 4 + turns.astype(np.float64))
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


@pytest.mark.parametrize("top", [2**32, 2**20, 2**8, 2])
def test_error_against_float64_is_below_1e_6_in_the_bulk_and_in_the_tails(top):
    rng = np.random.default_rng(0)
    radius_bits = rng.integers(0, top, 1_000_000, dtype=np.uint64).astype(np.uint32)
    angle_bits = rng.integers(0, 2**32, 1_000_000, dtype=np.uint64).astype(np.uint32)
    for near, exact in zip(
        noise.box_muller(radius_bits, angle_bits), exact_normals(radius_bits, angle_bits), strict=True
    ):
        assert np.abs(near - exact).max() < 1e-6


def test_tails_reach_beyond_six_sigma_and_the_extreme_uniforms_are_finite():
    cosine, _ = noise.box_muller(np.array([0], np.uint32), np.array([0], np.uint32))
    assert 6.6 < cosine[0] < 6.7
    for word in (0, 1, 2**32 - 1):
        edge = np.array([word] * 3, np.uint32)
        assert np.isfinite(noise.box_muller(edge, np.array([0, 2**31, 2**32 - 1], np.uint32))).all()


def test_a_radius_of_zero_is_positive_zero_in_every_implementation():
    # u rounds to 1 in one call of 2**25; this address is such a one.
    address = {"seed": 0, "iteration": 0, "direction": 0, "param_id": 0}
    wanted = noise.normals(start=99850920, length=1, **address)
    assert wanted[0] == 0
    centre = torch.tensor([-0.0])
    step = centre + torch.from_numpy(wanted)
    for implementation in (cpu, portable):
        target = torch.empty(1)
        implementation.perturb(centre, target, start=99850920, sigma=1.0, words=(0, 0, 0), key=(0, 0))
        assert same_bits(target, step)


def test_moments_of_a_million_elements_are_those_of_the_normal_law():
    sample = eps(0, 1_000_000).astype(np.float64)
    assert abs(sample.mean()) < 4e-3
    assert abs(sample.var() - 1) < 6e-3
    assert abs((sample**3).mean()) < 1.6e-2
    assert abs((sample**4).mean() - 3) < 4e-2


def test_data_order_is_a_pure_function_without_repeats():
    order = noise.data_order(100, seed=3, iteration=5, count=40)
    assert len(set(order.tolist())) == 40
    assert order.min() >= 0
    assert order.max() < 100
    assert np.array_equal(order, noise.data_order(100, seed=3, iteration=5, count=100)[:40])
    assert not np.array_equal(order, noise.data_order(100, seed=3, iteration=6, count=40))
