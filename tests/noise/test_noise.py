"""The noise: golden vectors, the kernels against the oracle bit for bit, and accuracy."""

import itertools
import json
import re
import sys
from pathlib import Path

import numba as nb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.codegen import get_host_cpu_features

from shardes import noise
from shardes.noise import NOISE_VERSION, Region, cpu, cpu_math, definition
from shardes.noise.cpu_math import u32
from shardes.noise.kinds.gaussian import normals
from shardes.noise.kinds.rademacher import signs
from tests.helpers.noise_oracle import ELEMENTWISE, FORMATS, accumulated, added, perturbed, same_bits
from tests.helpers.ranks import run_command

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "noise.md"
GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())
SIZE = 2**34
REGIONS = [
    *(
        Region(7, SIZE, start, length)
        for start, length in [(0, 0), (0, 1), (5, 1), (0, 63), (1, 63), (0, 64)]
    ),
    *(Region(7, SIZE, start, length) for start, length in [(63, 2), (0, 65), (7, 500), (2**33 + 3, 130)]),
    *(Region(7, SIZE, start, length) for start, length in [(2047, 2), (2000, 5000), (SIZE - 70, 70)]),
    Region(7, SIZE, 3, 7, rows=9, stride=40),
    Region(7, SIZE, 10, 130, rows=5, stride=131),
    Region(7, SIZE, 2030, 33, rows=40, stride=70),
    Region(7, SIZE, 2**32 - 5, 3, rows=4, stride=2**30),
    Region(7, SIZE, 64, 64, rows=3, stride=64),
    Region(7, SIZE, 9, 5, rows=0, stride=5),
]
ADDRESS = {"seed": 2**40 + 5, "iteration": 3}


def eps(start, length, **changes):
    address = {**ADDRESS, "direction": 2, "param_id": 7} | changes
    return normals(start=start, length=length, **address)


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
        words = definition.philox(np.array(counter, np.uint32)[:, None], tuple(key))
        assert words[:, 0].tolist() == wanted


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=str)
def test_the_definition_has_not_drifted(case):
    assert GOLDEN["noise_version"] == NOISE_VERSION
    address = {k: v for k, v in case.items() if k != "bits"}
    assert [f"{bits:08x}" for bits in normals(**address).view(np.uint32)] == case["bits"]


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(FORMATS, FORMATS)))
def test_perturb_equals_the_oracle(source_dtype, target_dtype, kind):
    for region in REGIONS:
        source = torch.linspace(-2, 2, region.num_elements).to(source_dtype)
        before = source.clone()
        target = torch.full((region.num_elements,), 9.0).to(target_dtype)
        arguments = {"region": region, "sigma": 0.01, "direction": 2, "kind": kind, **ADDRESS}
        noise.perturb(source, target, **arguments)
        assert same_bits(target, perturbed(source, target_dtype, **arguments)), region
        assert same_bits(source, before)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FORMATS)
def test_accumulate_equals_the_oracle(dtype, kind):
    for region in REGIONS:
        master = torch.linspace(-1, 1, region.num_elements).to(dtype)
        arguments = {"region": region, "kind": kind, **ADDRESS}
        arguments |= {"directions": [0, 5, 2, 9], "coefficients": [0.5, -0.25, 1e-3, 0.0]}
        wanted = accumulated(master, **arguments)
        noise.accumulate(master, **arguments)
        assert same_bits(master, wanted), region


@pytest.mark.parametrize("dtype", FORMATS)
def test_add_equals_the_oracle(dtype):
    for region in REGIONS:
        master = torch.linspace(-1, 1, region.num_elements).to(dtype)
        delta = torch.linspace(3e-3, -1e-3, region.num_elements)
        before, arguments = delta.clone(), {"region": region, **ADDRESS}
        wanted = added(master, delta, **arguments)
        noise.add(master, delta, **arguments)
        assert same_bits(master, wanted), region
        assert same_bits(delta, before)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", FORMATS)
def test_adding_a_float32_sum_is_accumulating(dtype, kind):
    steps = {"directions": [0, 5, 2], "coefficients": [0.5, -0.25, 1e-3], "kind": kind}
    for region in REGIONS:
        master, delta = torch.linspace(-1, 1, region.num_elements).to(dtype), torch.zeros(region.num_elements)
        accumulated_at_once = master.clone()
        noise.accumulate(accumulated_at_once, region=region, **steps, **ADDRESS)
        noise.accumulate(delta, region=region, **steps, **ADDRESS)
        noise.add(master, delta, region=region, **ADDRESS)
        assert same_bits(master, accumulated_at_once), region


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    iteration=st.integers(0, definition.MAX_ITERATION),
    direction=st.integers(0, definition.MAX_DIRECTION),
    param_id=st.integers(0, definition.MAX_PARAM_ID),
    start=st.integers(0, SIZE - 9000),
    length=st.integers(0, 200),
    rows=st.integers(0, 4),
    gap=st.integers(0, 2000),
    kind=st.sampled_from(ELEMENTWISE),
)
def test_any_address_gives_the_oracles_bits(
    seed, iteration, direction, param_id, start, length, rows, gap, kind
):
    region = Region(param_id, SIZE, start, length, rows=rows, stride=length + gap)
    address = {"seed": seed, "iteration": iteration, "region": region, "kind": kind}
    centre, target = torch.full((rows * length,), -0.0), torch.empty(rows * length)
    noise.perturb(centre, target, sigma=1.0, direction=direction, **address)
    wanted = perturbed(centre, torch.float32, sigma=1.0, direction=direction, **address)
    assert same_bits(target, wanted)
    steps = {"directions": [direction], "coefficients": [0.3]}
    for dtype in FORMATS:
        master = torch.full((rows * length,), 0.01, dtype=dtype)
        moved = accumulated(master, **steps, **address)
        summed = master.clone()
        noise.accumulate(master, **steps, **address)
        assert same_bits(master, moved)
        where = {key: address[key] for key in ("seed", "iteration", "region")}
        noise.add(summed, accumulated(torch.zeros(rows * length), **steps, **address), **where)
        assert same_bits(summed, moved)


def test_a_run_does_not_depend_on_where_it_is_cut():
    whole = eps(0, 1000)
    for cut in (1, 16, 63, 64, 65, 500):
        assert np.array_equal(np.concatenate([eps(0, cut), eps(cut, 1000 - cut)]), whole)


def test_threads_do_not_change_a_bit():
    source = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(500 * 601, generator=torch.Generator().manual_seed(1))
    regions = [Region(0, SIZE, 77, 300_001), Region(1, SIZE, 5, 601, rows=500, stride=777)]
    results = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append([])
            for values, region, kind in itertools.product((source, rows), regions, ELEMENTWISE):
                if values.numel() != region.num_elements:
                    continue
                address = {"seed": 1, "iteration": 0, "region": region, "kind": kind}
                target, master, narrow = torch.empty_like(values), values.clone(), values.bfloat16()
                noise.perturb(values, target, sigma=0.1, direction=0, **address)
                noise.accumulate(master, coefficients=[0.1, 0.2], directions=[0, 1], **address)
                noise.accumulate(narrow, coefficients=[0.1, 0.2], directions=[0, 1], **address)
                moved = values.bfloat16()
                noise.add(moved, values, region=region, seed=1, iteration=0)
                results[-1] += [target, master, narrow, moved]
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_every_part_of_the_address_changes_the_noise():
    base = {"seed": 1, "iteration": 1, "direction": 1, "param_id": 1}
    reference = normals(start=0, length=4096, **base)
    for other in (*({**base, k: 2} for k in base), {**base, "seed": 1 + 2**32}):
        correlation = np.corrcoef(reference, normals(start=0, length=4096, **other))[0, 1]
        assert abs(correlation) < 0.06  # four standard deviations


def test_float16_and_bfloat16_conversions_are_exact_for_every_pattern():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        finite = values[torch.isfinite(values.float())]
        wide = torch.empty(finite.numel())
        address = {"seed": 0, "iteration": 0, "direction": 0, "sigma": 0.0}
        region = Region(0, SIZE, 0, finite.numel())
        noise.perturb(finite, wide, region=region, **address)
        assert same_bits(wide, perturbed(finite, torch.float32, region=region, **address))
        # Half-way points and their neighbours, overflow to infinity, subnormals.
        between = (finite.float()[:-1].double() + finite.float()[1:].double()).div(2).float()
        for nudge in (0, 1, -1):
            source = (between.view(torch.int32) + nudge).view(torch.float32)
            narrow = torch.empty(source.numel(), dtype=dtype)
            region = Region(0, SIZE, 0, source.numel())
            noise.perturb(source, narrow, region=region, **address)
            assert same_bits(narrow, perturbed(source, dtype, region=region, **address))


def exact_normals(radius_bits, angle_bits):
    """Box-Muller in float64 from the same uniforms."""
    u = definition.radius_uniform(radius_bits).astype(np.float64)
    quadrant, turns = definition.angle_uniform(angle_bits)
    angle = 2 * np.pi * (quadrant / 4 + turns.astype(np.float64))
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


@pytest.mark.parametrize("top", [2**32, 2**20, 2**8, 2])
def test_error_against_float64_is_below_1e_6_in_the_bulk_and_in_the_tails(top):
    rng = np.random.default_rng(0)
    radius_bits = rng.integers(0, top, 1_000_000, dtype=np.uint64).astype(np.uint32)
    angle_bits = rng.integers(0, 2**32, 1_000_000, dtype=np.uint64).astype(np.uint32)
    for near, exact in zip(
        definition.box_muller(radius_bits, angle_bits), exact_normals(radius_bits, angle_bits), strict=True
    ):
        assert np.abs(near - exact).max() < 1e-6


def test_tails_reach_beyond_six_sigma_and_the_extreme_uniforms_are_finite():
    cosine, _ = definition.box_muller(np.array([0], np.uint32), np.array([0], np.uint32))
    assert 6.6 < cosine[0] < 6.7
    for word in (0, 1, 2**32 - 1):
        edge = np.array([word] * 3, np.uint32)
        assert np.isfinite(definition.box_muller(edge, np.array([0, 2**31, 2**32 - 1], np.uint32))).all()


def test_a_radius_of_zero_is_positive_zero():
    # u rounds to 1 in one call of 2**25; this address is such a one.
    address = {"seed": 0, "iteration": 0, "direction": 0, "param_id": 0}
    wanted = normals(start=99850920, length=1, **address)
    assert wanted[0] == 0
    centre, target = torch.tensor([-0.0]), torch.empty(1)
    region = Region(address.pop("param_id"), SIZE, 99850920, 1)
    noise.perturb(centre, target, region=region, sigma=1.0, **address)
    assert same_bits(target, centre + torch.from_numpy(wanted))


def test_moments_of_a_million_elements_are_those_of_the_normal_law():
    sample = eps(0, 1_000_000).astype(np.float64)
    assert abs(sample.mean()) < 4e-3
    assert abs(sample.var() - 1) < 6e-3
    assert abs((sample**3).mean()) < 1.6e-2
    assert abs((sample**4).mean() - 3) < 4e-2


def test_the_numbers_that_draw_tokens_are_those_of_the_documentation():
    arguments = {"seed": 1, "iteration": 2, "prompt": 3, "sample": 4, "count": 5}
    turns = [definition.sampling_uniforms(**arguments, **turn) for turn in ({}, {"turn": 0}, {"turn": 3})]
    shown = [[int(value * 2**24) for value in numbers] for numbers in turns]
    first, later = (
        [3141445, 1084066, 5748954, 1835209, 8482054],
        [562521, 12798621, 12243652, 11666194, 8833167],
    )
    assert shown == [first, first, later]
    for numbers in (first, later):
        assert ", ".join(map(str, numbers)) in DOCUMENTATION.read_text()
    # Call 3 * 2**20 of the stream.
    call = np.array([3 * 2**20], np.uint64)
    words = definition.call_words(call, seed=1, iteration=2, direction=4, param_id=3, stream=4)
    assert [int(word >> 8) for word in words[:, 0]] == later[:4]


def test_data_order_is_a_pure_function_without_repeats():
    order = definition.data_order(100, seed=3, iteration=5, count=40)
    assert len(set(order.tolist())) == 40
    assert order.min() >= 0
    assert order.max() < 100
    assert np.array_equal(order, definition.data_order(100, seed=3, iteration=5, count=100)[:40])
    assert not np.array_equal(order, definition.data_order(100, seed=3, iteration=6, count=40))


# Stochastic rounding.


def test_the_rounding_bits_and_the_signs_of_the_documentation():
    address = {"seed": 1, "iteration": 2, "param_id": 4}
    bits = definition.rounding_bits(start=60, length=4, **address)
    assert bits.tolist() == [0x12B2, 0xF775, 0xAE9F, 0x5E5C]
    found = signs(direction=3, start=510, length=8, **address)
    assert found.tolist() == [-1, -1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.bfloat16, definition.round_to_bfloat16), (torch.float16, definition.round_to_float16)],
)
def test_stochastic_rounding_picks_a_neighbour_as_often_as_the_other_is_far(dtype, rounded):
    every_bits = np.arange(2**16, dtype=np.uint32)
    values = [1.0, 1.001, -1.001, 3.14159, 255.9, 0.00313, -7e-5, 6.1e-5, 3.3e-6, 5e-8, 1e-9, -0.0, 65000.0]
    for value in map(np.float32, values):
        found = (
            torch.from_numpy(rounded(np.full(2**16, value), every_bits).view(np.int16)).view(dtype).double()
        )
        neighbours = found.unique()
        assert len(neighbours) <= 2
        assert neighbours.min() <= value <= neighbours.max()
        # Over all random bits the mean is the value itself: unbiased.
        assert abs(found.mean() - float(value)) <= 2.0**-40
    for value, wanted in [(np.inf, np.inf), (-np.inf, -np.inf), (3.4e38, torch.finfo(dtype).max)]:
        found = rounded(np.full(2**16, value, np.float32), every_bits).view(np.int16)
        assert (torch.from_numpy(found).view(dtype).double() == wanted).all()
    nan = rounded(np.full(3, np.nan, np.float32), every_bits[-3:]).view(np.int16)
    assert torch.from_numpy(nan).view(dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_updates_of_a_narrow_master_add_up(dtype):
    # Each moves an element by a fiftieth of its step; rounding to nearest would lose them all.
    size, coefficient = 20_000, 0.02 * float(torch.finfo(dtype).eps)
    master, exact = torch.ones(size, dtype=dtype), torch.ones(size, dtype=torch.float64)
    region = Region(1, size, 0, size)
    for iteration in range(100):
        eps = normals(seed=3, iteration=iteration, direction=0, param_id=1, start=0, length=size)
        exact += coefficient * torch.from_numpy(eps)
        noise.accumulate(
            master, region=region, coefficients=[coefficient], directions=[0], seed=3, iteration=iteration
        )
    error = master.double() - exact
    # Independent roundings: the mean error is zero within five standard errors, and not along the way moved.
    assert abs(error.mean()) < 5 * error.std() / size**0.5
    assert abs(np.corrcoef(error.numpy(), (exact - 1).numpy())[0, 1]) < 5 / size**0.5
    assert error.std() < 2 * torch.finfo(dtype).eps


# Rademacher.


def test_signs_are_balanced_and_bits_are_not_shared_between_elements():
    sample = signs(seed=1, iteration=0, direction=0, param_id=0, start=0, length=2**20)
    assert set(sample.tolist()) == {-1.0, 1.0}
    assert abs(sample.mean()) < 4 / 2**10
    for lag in (1, 15, 16, 17, 512, 2048):
        assert abs((sample[lag:] * sample[:-lag]).mean()) < 4 / (2**20 - lag) ** 0.5


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10, 0, 5), "param_id is -1"),
        ((2**24, 10, 0, 5), "param_id is 16777216"),
        ((0, 2**34 + 1, 0, 5), "17179869185 elements; wanted at most 17179869184"),
        ((0, 10, 6, 5), "elements up to 11 do not lie inside parameter 0, which has 10"),
        ((0, 10, -1, 5), "must not be negative"),
        ((0, 100, 0, 5, 3, 4), "overlap"),
        ((0, 100, 0, 5, 3, 50), "elements up to 105 do not lie inside"),
    ],
)
def test_a_region_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Region(*arguments)


def test_as_many_coefficients_as_directions_are_wanted():
    with pytest.raises(ValueError, match="got 1 coefficients for 3 directions"):
        noise.accumulate(
            torch.zeros(10),
            region=Region(0, 10, 0, 10),
            coefficients=[0.5],
            directions=range(3),
            seed=0,
            iteration=0,
        )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(10, dtype=torch.float64), "is torch.float64; wanted float32, bfloat16 or float16"),
        (torch.zeros(20)[::2], "is not contiguous"),
        (torch.zeros(9), "has 9 elements, but its region has 10"),
        (torch.zeros(10, device="meta"), "no noise kernel for the device meta"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_refused(tensor, message):
    region, address = Region(0, 10, 0, 10), {"seed": 0, "iteration": 0}
    good = torch.zeros(10, device=tensor.device)
    calls = [
        lambda: noise.perturb(tensor, good, region=region, sigma=1, direction=0, **address),
        lambda: noise.perturb(good, tensor, region=region, sigma=1, direction=0, **address),
        lambda: noise.accumulate(tensor, region=region, coefficients=[1], directions=[0], **address),
        lambda: noise.add(tensor, good, region=region, **address),
        lambda: noise.add(good, tensor, region=region, **address),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_what_is_added_is_float32_on_the_masters_device():
    address = {"region": Region(0, 10, 0, 10), "seed": 0, "iteration": 0}
    with pytest.raises(ValueError, match=r"delta is torch.bfloat16; wanted float32"):
        noise.add(torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16), **address)
    with pytest.raises(ValueError, match="master is on cpu and delta on meta; wanted one device"):
        noise.add(torch.zeros(10), torch.zeros(10, device="meta"), **address)


def test_no_kernel_is_compiled_again_for_another_member_iteration_or_shape():
    address = {"seed": 2**63, "iteration": 2**32 - 1}
    for kind in ELEMENTWISE:
        regions = [Region(0, SIZE, 0, 64), Region(9, SIZE, 2**33 + 1, 1), Region(3, SIZE, 5, 7, 300, 11)]
        for region, direction in itertools.product(regions, (0, 2**24 - 1)):
            master = torch.zeros(region.num_elements + 1)[1:]
            noise.perturb(
                master, master, region=region, sigma=1e-3, direction=direction, kind=kind, **address
            )
            steps = {
                "coefficients": [0.1] * (direction % 7 + 1),
                "directions": [direction] * (direction % 7 + 1),
            }
            noise.accumulate(master, region=region, kind=kind, **steps, **address)
            noise.add(master.half(), master, region=region, **address)
        fill = kind.fill(torch.device("cpu"))
        kernels = [cpu.perturb_kernel(fill, 0, 0), cpu.accumulate_kernel(fill, 0)]
        kernels.append(cpu.add_kernel(cpu.FORMATS[torch.float16]))
        assert [len(kernel.signatures) for kernel in kernels] == [1, 1, 1]


def test_another_process_finds_the_kernels_compiled():
    code = (
        "import torch\n"
        "from shardes import noise\n"
        "from shardes.noise import GAUSSIAN, Rademacher, Region, cpu\n"
        "master, region = torch.zeros(9), Region(0, 9, 0, 9)\n"
        "for kind in (GAUSSIAN, Rademacher()):\n"
        "    address = {'region': region, 'seed': 1, 'iteration': 0, 'kind': kind}\n"
        "    noise.perturb(master, master, sigma=1.0, direction=0, **address)\n"
        "    noise.accumulate(master, coefficients=[1.0], directions=[0], **address)\n"
        "    fill = kind.fill(master.device)\n"
        "    for kernel in (cpu.perturb_kernel(fill, 0, 0), cpu.accumulate_kernel(fill, 0)):\n"
        "        print(kernel.stats.cache_misses)\n"
    )
    assert cpu.FORMATS[torch.float32] == 0
    run_command([sys.executable, "-c", code])  # whoever is first compiles
    found = run_command([sys.executable, "-c", code])
    assert found.stdout.splitlines() == ["Counter()"] * 4, found.stdout + found.stderr


@pytest.mark.skipif("+avx512vl" not in get_host_cpu_features(), reason="for processors with AVX-512")
def test_vectors_are_as_wide_as_the_processors():
    @nb.njit
    def fill(eps):
        for i in range(eps.size):
            eps[i] = cpu_math.four_normals(u32(i), u32(1), u32(2), u32(3), u32(4), u32(5))[0]

    eps = np.empty(64, np.float32)
    fill(eps)
    (code,) = fill.inspect_asm().values()
    assert re.findall(r"vsqrtps\s+%(.)mm", code)[:1] == ["z"]


def test_what_the_user_tells_numba_counts():
    code = (
        "import shardes.noise.cpu\n"
        "from numba.core.registry import cpu_target\n"
        "print(cpu_target.target_context.codegen()._tm_features)\n"
    )
    found = run_command([sys.executable, "-c", code], NUMBA_CPU_FEATURES="+avx2")
    assert found.stdout.strip() == "+avx2", found.stderr
