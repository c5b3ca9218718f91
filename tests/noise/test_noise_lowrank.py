"""Low-rank noise: golden vectors, the kernels against the oracle bit for bit, and what is refused."""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes import noise
from shardes.noise import GAUSSIAN, LowRank, Region, definition
from shardes.noise.kinds.gaussian import normals
from shardes.noise.kinds.low_rank import tables
from tests.helpers.noise_oracle import FORMATS, accumulated, perturbed, same_bits
from tests.noise.gpu.checks import interpreted, use_for_cpu

GOLDEN = json.loads((Path(__file__).parent / "golden_noise.json").read_text())["low_rank"]
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "noise.md"
ADDRESS = {"seed": 2**40 + 5, "iteration": 3}
UPDATE = {"directions": [0, 5, 2, 9, 2**24 - 1], "coefficients": [0.5, -0.25, 1e-3, 0.0, 0.7]}
HAS_CUDA = torch.cuda.is_available()


def region_of(shape, start=0, length=None, *, rows=1, stride=0, param_id=7):
    size = math.prod(shape)
    return Region(
        param_id, size, start, size if length is None else length, rows=rows, stride=stride, shape=shape
    )


REGIONS = [
    region_of((7, 33)),
    region_of((7, 33), 3, 0),
    region_of((7, 33), 40, 5),
    region_of((7, 33), 30, 6),
    region_of((7, 33), 33, 66),
    region_of((7, 33), 3, 200),
    region_of((12, 700)),
    region_of((9, 1)),
    region_of((1, 300), 17, 200),
    region_of((3, 5, 70)),
    region_of((3, 5, 70), 340, 400),
    # Columns: of a matrix, of experts, and of some rows of some experts.
    region_of((7, 33), 10, 12, rows=7, stride=33),
    region_of((3, 5, 70), 35, 35, rows=15, stride=70),
    region_of((3, 5, 70), 4 * 70 + 3, 20, rows=4, stride=70),
    # Some rows of every expert.
    region_of((3, 5, 70), 140, 140, rows=3, stride=350),
    region_of((7, 33), 33, 33, rows=3, stride=33),
    region_of((7, 33), 30, 10, rows=3, stride=60),
    region_of((130,), 5, 100),
    region_of((), 0, 1),
]


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_CUDA else "interpreter"])
def device(request, monkeypatch):
    """Has the noise use the kernels for GPUs; gives the device of the tensors."""
    if request.param == "interpreter":
        pytest.importorskip("triton")
        use_for_cpu(monkeypatch, interpreted())
        from triton.runtime.interpreter import InterpretedFunction

        # A launch readies triton.language for the interpreter; each call of a function would do so once more.
        monkeypatch.setattr(InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def check(device, region, *, kind, source_dtype=torch.float32, target_dtype=torch.float32, **address):
    address = ADDRESS | address
    source = torch.linspace(-2, 2, region.num_elements).to(source_dtype)
    target = torch.full((region.num_elements,), 9.0, dtype=target_dtype, device=device)
    step = {"region": region, "sigma": 0.01, "direction": 2, "kind": kind}
    noise.perturb(source.to(device), target, **step, **address)
    assert same_bits(target.cpu(), perturbed(source, target_dtype, **step, **address)), region
    master = source.to(device, copy=True)
    noise.accumulate(master, region=region, kind=kind, **UPDATE, **address)
    wanted = accumulated(source, region=region, kind=kind, **UPDATE, **address)
    assert same_bits(master.cpu(), wanted), region


CPU = torch.device("cpu")


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_every_region_gives_the_oracles_bits(rank):
    for region in REGIONS:
        check(CPU, region, kind=LowRank(rank))


@pytest.mark.parametrize("source_dtype", FORMATS)
def test_every_format_gives_the_oracles_bits(source_dtype):
    for region in (region_of((40, 700), 650, 3000), region_of((7, 33), 10, 12, rows=7, stride=33)):
        for target_dtype in FORMATS:
            check(CPU, region, kind=LowRank(3), source_dtype=source_dtype, target_dtype=target_dtype)


@pytest.mark.parametrize(
    ("source_dtype", "target_dtype"), zip(FORMATS, [*FORMATS[1:], FORMATS[0]], strict=True)
)
def test_the_gpus_kernels_give_the_oracles_bits(device, source_dtype, target_dtype):
    for region in (region_of((20, 300), 250, 3000), region_of((3, 5, 70), 343, 20, rows=3, stride=70)):
        check(device, region, kind=LowRank(2), source_dtype=source_dtype, target_dtype=target_dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    iteration=st.integers(0, definition.MAX_ITERATION),
    param_id=st.integers(0, definition.MAX_PARAM_ID),
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 9),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_address_and_cut_gives_the_oracles_bits(seed, iteration, param_id, shape, rank, cut):
    size = math.prod(shape)
    start, end = sorted(int(part * size) for part in cut)
    region = region_of(shape, start, end - start, param_id=param_id)
    check(CPU, region, kind=LowRank(rank), seed=seed, iteration=iteration)


def test_tiles_that_are_cut_for_memory_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(tables, "MAX_TABLE", 45)
    for region in REGIONS:
        if region.num_elements < 3000:
            check(CPU, region, kind=LowRank(2))


def test_threads_do_not_change_a_bit():
    region, results = region_of((301, 700), 3, 200_000), []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            target, master = torch.empty(200_000), torch.ones(200_000, dtype=torch.bfloat16)
            address = {"region": region, "kind": LowRank(2), **ADDRESS}
            noise.perturb(torch.ones(200_000), target, sigma=0.1, direction=3, **address)
            noise.accumulate(master, **UPDATE, **address)
            results.append((target, master))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["_perturb", "_accumulate"])
def test_the_compiler_neither_fuses_nor_flushes(name, tmp_path, monkeypatch):
    """The code for an H200, which can be made without one."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(importlib.import_module("shardes.noise.kinds.low_rank.gpu"), name)
    pointers = dict.fromkeys(("left", "right", "source"), "*fp32") | dict.fromkeys(
        ("target", "master"), "*bf16"
    )
    types = {p.name: p.annotation_type or pointers.get(p.name, "constexpr") for p in kernel.params}
    sizes = {"height": 16, "width": 128}
    places = {(p.num,): sizes[p.name] for p in kernel.params if p.is_constexpr}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    source = ASTSource(kernel, types, places, {})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert {"add.rn.f32", "mul.rn.f32"} <= set(re.findall(r"\b(?:add|mul)[\w.]*\.f32", code))
    assert not re.search(r"\bfma|ftz|approx", code)


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_definition_has_not_drifted(case):
    address = {key: value for key, value in case.items() if key not in ("bits", "rank")}
    found = LowRank(case["rank"]).eps(**address)
    assert [f"{bits:08x}" for bits in found.view(np.uint32)] == case["bits"]


def test_the_documentation_shows_a_golden_case():
    assert all(bits in DOCUMENTATION.read_text() for bits in GOLDEN[0]["bits"])


def test_a_vector_has_the_noise_of_full_rank():
    address = {"start": 5, "length": 50, "direction": 1, "param_id": 2, **ADDRESS}
    found = LowRank(4).eps(shape=(99,), **address)
    assert np.array_equal(found, normals(**address))


@pytest.mark.parametrize("shape", [(9, 14), (3, 4, 5)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_factors_are_those_of_the_noise(shape, rank):
    kind, address = LowRank(rank), {"param_id": 3, "shape": shape, **ADDRESS}
    left, right = noise.factors(kind=kind, device=CPU, directions=[8, 2, 8], **address)
    for place, direction in enumerate([8, 2, 8]):
        eps = kind.eps(start=0, length=math.prod(shape), direction=direction, **address)
        product = (left[place].double() @ right[place].double().mT).flatten()
        np.testing.assert_allclose(product, eps, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_elements_have_mean_zero_and_variance_one_and_the_matrix_its_rank(rank):
    address = {"param_id": 0, "shape": (300, 300), "seed": 4, "iteration": 0}
    samples = [LowRank(rank).eps(direction=n, start=0, length=90_000, **address) for n in range(40)]
    matrix = samples[0].reshape(300, 300).astype(np.float64)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert (singular > singular[0] * 1e-5).sum() == rank
    every = np.stack(samples).astype(np.float64)
    # A direction's mean square varies by what its factors' lengths do: about sqrt(4 / (300 rank)).
    assert abs(every.mean()) < 5 / 300 / 40**0.5
    assert abs((every**2).mean() - 1) < 5 * (4 / (300 * rank * 40)) ** 0.5
    assert np.abs(every).max() < LowRank(rank).largest


def test_the_two_factors_and_other_noise_are_independent():
    address = {"param_id": 1, "direction": 2, "start": 0, "length": 4096, **ADDRESS}
    streams = (definition.Stream.GAUSSIAN, definition.Stream.LEFT, definition.Stream.RIGHT)
    samples = [normals(stream=stream, **address) for stream in streams]
    assert np.abs(np.corrcoef(samples) - np.eye(3)).max() < 0.06  # four standard deviations


def test_what_no_eps_exceeds_is_reached_by_no_product_of_the_largest_normals():
    for rank in (1, 2, 7):
        extreme = np.float32(6.6604371)
        assert rank * np.float32(extreme * LowRank(rank).scale) * extreme < LowRank(rank).largest
    assert GAUSSIAN.largest < LowRank(1).largest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRank(0), "the rank is 0; wanted at least 1"),
        (lambda: Region(0, 12, 0, 12, shape=(3, 5)), "shape (3, 5) has not 12 elements"),
        (lambda: use(Region(0, 24, 0, 24)), "needs the parameter's shape"),
        (lambda: use(region_of((2, 3, 2, 2))), "no rule for a parameter of shape [2, 3, 2, 2]"),
        (
            lambda: noise.factors(
                kind=LowRank(), param_id=0, shape=(4,), directions=[0], device=torch.device("cpu"), **ADDRESS
            ),
            "a parameter of shape [4] has no factors",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def use(region):
    values = torch.zeros(region.num_elements)
    noise.perturb(values, values, region=region, sigma=1.0, direction=0, kind=LowRank(), **ADDRESS)
