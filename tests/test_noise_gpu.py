"""The GPU kernels of the noise and of the digest against their definitions, bit for bit.

On a machine with a CUDA device they run on it, and are marked ``gpu``. On any other the same tests run under
Triton's interpreter, on CPU tensors.
"""

import functools
import importlib
import itertools
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardes.es
from shardes import noise
from shardes.errors import UserError
from shardes.es.digest import add_digest
from shardes.noise import NoiseKind, Region, definition
from shardes.noise.definition import BLOCK, LANES, MAX_ELEMENTS, MAX_PARAM_ID, SIGN_BLOCK, Stream
from tests.helpers.noise_oracle import FORMATS, accumulated, perturbed, same_bits

pytest.importorskip("triton")

HAS_CUDA = torch.cuda.is_available()
MODULES = ["shardes.noise.gpu_math", "shardes.noise.gpu", "shardes.es.digest_gpu"]

SIZE = MAX_ELEMENTS
ADDRESS = {"seed": 2**63 + 2**31 + 5, "iteration": 2**31 + 3}
UPDATE = {"directions": [0, 2**24 - 1, 5], "coefficients": [0.5, -0.25, 1e-3]}
FEW_REGIONS = [
    Region(7, SIZE, 5, 65),
    Region(MAX_PARAM_ID, SIZE, SIZE - 1500, 1500),
    Region(7, SIZE, 2030, 33, rows=9, stride=70),
]
REGIONS = [
    *(Region(7, SIZE, start, 1) for start in (0, 5, 63, 2047)),
    *(Region(7, SIZE, start, length) for start in (0, 1, 40) for length in (63, 64, 65)),
    *(Region(7, SIZE, start, length) for start, length in [(63, 2), (2047, 2), (0, 1024), (64, 4096)]),
    # The borders of the programs of 1024 elements that have none, or just miss it.
    *(Region(7, SIZE, start, length) for start, length in [(1, 1087), (63, 1090), (64, 1023), (64, 2047)]),
    *(Region(7, SIZE, start, length) for start, length in [(2**33 + 3, 130), (2**31 - 70, 140)]),
    Region(7, SIZE, 3, 7, rows=40, stride=40),
    Region(7, SIZE, 10, 130, rows=25, stride=131),
    Region(7, SIZE, 64, 64, rows=30, stride=128),
    Region(7, SIZE, 64, 64, rows=3, stride=64),
    Region(7, SIZE, 2**32 - 5, 3, rows=4, stride=2**30),
    Region(7, SIZE, SIZE - 5000, 1, rows=50, stride=100),
    *FEW_REGIONS,
]
EMPTY_REGIONS = [Region(7, SIZE, 3, 0), Region(7, SIZE, 9, 5, rows=0, stride=5)]

# Zero, subnormals, ties and overflow of both narrow formats, infinity and NaNs; each with either sign.
PATTERNS = [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000, 0x007FFFFF, 0x00800000]
PATTERNS += [0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000]
PATTERNS += [0x32FFFFFF, 0x33000000, 0x33000001, 0x33C00000, 0x387FE000, 0x387FEFFF, 0x387FF000, 0x38800000]
PATTERNS += [0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]
PATTERNS += [0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF]
EXTREMES = torch.from_numpy(
    np.array([p | s for p in PATTERNS for s in (0, 1 << 31)], np.uint32).view(np.float32)
)

# More than a program can go astray by.
MARGIN = 2 * SIGN_BLOCK + 1


def import_apart(*, interpret):
    """The kernels' modules imported anew, for the interpreter or the compiler; no other test sees them."""
    held = {name: sys.modules.pop(name, None) for name in MODULES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        try:
            return SimpleNamespace(**{n.rpartition(".")[2]: importlib.import_module(n) for n in MODULES})
        finally:
            for name, module in held.items():
                package, _, attribute = name.rpartition(".")
                sys.modules.pop(name, None)
                vars(sys.modules[package]).pop(attribute, None)
                if module is not None:
                    sys.modules[name] = module
                    setattr(sys.modules[package], attribute, module)


interpreted = functools.cache(functools.partial(import_apart, interpret=True))
compiled = functools.cache(functools.partial(import_apart, interpret=False))


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_CUDA else "interpreter"])
def kernels(request, monkeypatch):
    """Has the entries of the noise and of the digest use the Triton kernels; gives their device."""
    if request.param == "cuda":
        yield SimpleNamespace(device=torch.device("cuda"), gpu=importlib.import_module("shardes.noise.gpu"))
        return
    from triton.runtime.interpreter import InterpretedFunction

    modules = interpreted()
    monkeypatch.setattr(noise, "_kernels", lambda device: modules.gpu)
    monkeypatch.setattr(shardes.es, "digest_cpu", modules.digest_gpu, raising=False)
    # A launch readies triton.language for the interpreter; each call of a function would do so once more, in
    # three milliseconds.
    monkeypatch.setattr(InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    with np.errstate(all="ignore"):
        yield SimpleNamespace(device=torch.device("cpu"), gpu=modules.gpu)


@pytest.fixture
def large_programs(kernels, monkeypatch):
    """Programs of more calls where a program takes long, whatever its size: under the interpreter."""
    if kernels.device.type == "cpu":
        sizes = {NoiseKind.GAUSSIAN: (BLOCK, 4096), NoiseKind.RADEMACHER: (SIGN_BLOCK, 512)}
        monkeypatch.setattr(kernels.gpu, "_SIZES", sizes)


class Framed:
    """A copy of some values on a device, at an address that is no multiple of 16, among other elements."""

    def __init__(self, values, device):
        self.whole = torch.full((values.numel() + 2 * MARGIN,), 9.0, dtype=values.dtype, device=device)
        self.values = self.whole[MARGIN : MARGIN + values.numel()]
        self.values.copy_(values)

    def result(self):
        """The values, after a check that what lies around them is as it was."""
        assert (self.whole[:MARGIN] == 9).all()
        assert (self.whole[self.whole.numel() - MARGIN :] == 9).all()
        return self.values.cpu()


def check_perturb(kernels, source, target_dtype, **arguments):
    centre = Framed(source, kernels.device)
    target = Framed(torch.full_like(source, -7, dtype=target_dtype), kernels.device)
    noise.perturb(centre.values, target.values, **arguments)
    assert same_bits(target.result(), perturbed(source, target_dtype, **arguments)), arguments
    assert same_bits(centre.result(), source)


def check_accumulate(kernels, values, **arguments):
    master = Framed(values, kernels.device)
    noise.accumulate(master.values, **arguments)
    assert same_bits(master.result(), accumulated(values, **arguments)), arguments


def values_for(region, dtype, limit=2.0):
    return torch.linspace(-limit, limit, region.num_elements).to(dtype)


# Every region, every format.


@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize(("source_dtype", "target_dtype"), list(itertools.product(FORMATS, FORMATS)))
def test_perturb_equals_the_oracle(kernels, source_dtype, target_dtype, kind):
    for region in FEW_REGIONS:
        source = values_for(region, source_dtype)
        check_perturb(
            kernels, source, target_dtype, region=region, sigma=0.01, direction=2, kind=kind, **ADDRESS
        )


@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize("dtype", FORMATS)
def test_accumulate_equals_the_oracle(kernels, dtype, kind):
    for region in FEW_REGIONS:
        check_accumulate(kernels, values_for(region, dtype), region=region, kind=kind, **UPDATE, **ADDRESS)


@pytest.mark.parametrize("kind", NoiseKind)
def test_every_region_gives_the_oracles_bits(kernels, kind):
    steps = {"directions": [3], "coefficients": [0.3]}
    for region in REGIONS:
        source = values_for(region, torch.float32)
        check_perturb(
            kernels, source, source.dtype, region=region, sigma=0.01, direction=2, kind=kind, **ADDRESS
        )
        check_accumulate(kernels, source.bfloat16(), region=region, kind=kind, **steps, **ADDRESS)


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("kind", NoiseKind)
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
    kind=st.sampled_from(NoiseKind),
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


def test_nothing_to_do_and_nothing_to_add(kernels):
    for region in EMPTY_REGIONS:
        nothing = torch.empty(0)
        check_perturb(kernels, nothing, torch.bfloat16, region=region, sigma=0.01, direction=2, **ADDRESS)
        check_accumulate(kernels, nothing, region=region, **UPDATE, **ADDRESS)
    # Without a direction the sum is +0, which makes -0 +0 and leaves the rest.
    region = Region(7, SIZE, 5, 70)
    for dtype, kind in itertools.product(FORMATS, NoiseKind):
        values = torch.cat([torch.tensor([-0.0]), torch.linspace(-3, 3, 69)]).to(dtype)
        check_accumulate(kernels, values, region=region, kind=kind, directions=[], coefficients=[], **ADDRESS)


def test_the_order_of_the_sum_is_the_order_given(kernels):
    # 2**24 + x - 2**24 keeps whole numbers only: another order gives other bits.
    region = Region(7, SIZE, 0, 200)
    for kind, directions in itertools.product(NoiseKind, ([1, 2, 1], [2, 1, 1], [1, 1, 2])):
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


# Rounding.


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
        kind = NoiseKind.RADEMACHER
        check_perturb(
            kernels, source, dtype, region=region, sigma=half_step, direction=2, kind=kind, **ADDRESS
        )


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_of_every_pattern_equals_the_oracle(kernels, dtype, kind):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    region = Region(7, SIZE, 2**32 - 5, every.numel())
    check_accumulate(kernels, every, region=region, kind=kind, directions=[1], coefficients=[1e-3], **ADDRESS)


@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize("dtype", FORMATS)
def test_accumulate_rounds_extremes_as_the_oracle_does(kernels, dtype, kind):
    values = EXTREMES.to(dtype)
    region = Region(7, SIZE, 11, values.numel())
    for coefficients in ([1e-41], [1e-8], [3e4], [3e38, 3e38], [float("inf")]):
        steps = {"directions": list(range(len(coefficients))), "coefficients": coefficients}
        check_accumulate(kernels, values, region=region, kind=kind, **steps, **ADDRESS)


@pytest.mark.parametrize("kind", NoiseKind)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_finite_sum_stays_finite(kernels, dtype, kind):
    limits = torch.finfo(dtype)
    values = torch.full((200,), limits.max, dtype=dtype) * torch.tensor([1, -1], dtype=dtype).repeat(100)
    steps = {"directions": [0], "coefficients": [limits.max * limits.eps / 8]}
    region = Region(7, SIZE, 11, values.numel())
    assert accumulated(values, region=region, kind=kind, **steps, **ADDRESS).isfinite().all()
    check_accumulate(kernels, values, region=region, kind=kind, **steps, **ADDRESS)


# The digest.


def mix(value):
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def reference_digest(values, region):
    """docs/noise.md in Python's integers."""
    width = {4: np.uint32, 2: np.uint16}[values.element_size()]
    bits = values.view(torch.int32 if width == np.uint32 else torch.int16).numpy().view(width).tolist()
    rows = range(region.start, region.start + region.rows * region.stride, region.stride or 1)
    starts = [region.start] if region.rows == 1 else rows
    elements = [element for start in starts for element in range(start, start + region.length)]
    addresses = [(i * 0x9E3779B97F4A7C15 + region.param_id * 0x5E2D58D8B3BCDF1B) % 2**64 for i in elements]
    return sum(mix(mix(address) ^ b) for address, b in zip(addresses, bits, strict=True)) % 2**64


def digest_of(kernels, values, region, before=0):
    total = torch.full((1,), before, dtype=torch.int64, device=kernels.device)
    add_digest(total, Framed(values, kernels.device).values, region=region)
    return int(total.item()) % 2**64


def test_the_digest_is_that_of_the_documentation(kernels):
    values = torch.tensor([1.0, -2.0, 0.5])
    assert digest_of(kernels, values, Region(4, SIZE, 60, 3)) == 0xE95D29EE4F0B2AA9


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_digest_equals_a_sum_of_integers(kernels, dtype):
    for region in [*EMPTY_REGIONS, *REGIONS[::3], *FEW_REGIONS, Region(5, SIZE, 2**33 + 1, 9000)]:
        values = values_for(region, dtype)
        assert digest_of(kernels, values, region) == reference_digest(values, region), region
    assert digest_of(kernels, values, region, before=-5) == (reference_digest(values, region) - 5) % 2**64


def test_the_digest_tells_apart_zeros_nans_and_places(kernels):
    region = Region(5, SIZE, 3, 2)
    values = [torch.tensor(pair) for pair in ([0.0, 0.0], [0.0, -0.0], [-0.0, 0.0])]
    values += [EXTREMES[-2:], EXTREMES[-2:].flip(0)]  # NaNs that differ in their sign
    digests = [digest_of(kernels, pair, region) for pair in values]
    assert digests == [reference_digest(pair, region) for pair in values]
    assert len(set(digests)) == len(values)


# What the compiler is told, and makes of it.


def test_a_call_number_fits_into_one_word():
    assert MAX_ELEMENTS // BLOCK * LANES <= 2**32


def test_no_argument_makes_triton_compile_a_kernel_again():
    """Of its arguments Triton computes a key; kernels are compiled once a key. Formats may change it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    small = [0, 1, 2, 16, 17, 2**31 - 1]
    integers = {"i32": small, "u32": [*small, 2**32 - 1], "i64": [*small, 2**31, 2**33, 2**34 - 1]}
    memory = torch.zeros(64)
    modules = compiled()
    for kernel in (modules.gpu._perturb, modules.gpu._accumulate, modules.digest_gpu._digest):
        key = create_function_from_signature(kernel.signature, kernel.params, backend)
        seen = set()
        for n, offset in itertools.product(range(9), range(5)):
            arguments = {}
            for parameter in kernel.params:
                if parameter.is_constexpr:
                    arguments[parameter.name] = 64
                elif parameter.annotation_type:
                    choices = integers[parameter.annotation_type]
                    arguments[parameter.name] = choices[n % len(choices)]
                else:
                    arguments[parameter.name] = memory[offset:]
            seen.add(str(key(**arguments)[1]))
        assert len(seen) == 1, seen


def test_the_compiler_neither_fuses_nor_flushes_nor_approximates(tmp_path, monkeypatch):
    """The code for an H200, which can be made without one."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Recorder(dict):
        def __getitem__(self, grid):
            return lambda *arguments, **options: self.update(options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    gpu, options, nothing = compiled().gpu, Recorder(), (torch.zeros(1), torch.zeros(1))
    gpu.launch(options, *gpu._SIZES[NoiseKind.GAUSSIAN], nothing, Region(0, 1, 0, 1), ())
    constants = {name: options.pop(name) for name in ("size", "calls", "strided")}
    pointers = {"source": "*fp32", "target": "*fp16", "master": "*fp16", "table": "*i32"}
    for kernel in (gpu._perturb, gpu._accumulate):
        types = {p.name: p.annotation_type or pointers.get(p.name, "constexpr") for p in kernel.params}
        places = {(p.num,): constants[p.name] for p in kernel.params if p.is_constexpr}
        source = ASTSource(kernel, types, places, {})
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(options)).asm["ptx"]
        # Triton 3.4 has a square root that flushes subnormals, which its argument never is.
        code = code.replace("sqrt.rn.ftz", "sqrt.rn")
        operations = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*\.f(?:16|32))\s", code, re.M))
        exact = ("mov", "selp", "setp", "ld", "st", "neg", "abs")
        assert {name for name in operations if not name.startswith(exact)} <= {
            *("add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32"),
            *("cvt.rn.f32.s32", "cvt.rn.f32.u32", "cvt.f32.f16", "cvt.rn.f16.f32", "cvt.rzi.s32.f32"),
        }
        assert {"add.rn.f32", "mul.rn.f32", "sqrt.rn.f32"} <= operations
        assert not re.search(r"\bfma|ftz|approx", code)


def test_triton_missing_is_a_message_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"triton is not installed.*pip install triton"):
        import_apart(interpret=False)


def test_an_update_copies_its_coefficients_once_for_all_parameters(kernels):
    kernels.gpu._table.cache_clear()
    for param_id in range(3):
        region = Region(param_id, SIZE, 0, 10)
        check_accumulate(kernels, torch.zeros(10), region=region, **UPDATE, **ADDRESS)
    assert kernels.gpu._table.cache_info().misses == 1
    check_accumulate(kernels, torch.zeros(10), region=region, **ADDRESS, directions=[0], coefficients=[-0.0])
    check_accumulate(kernels, torch.zeros(10), region=region, **ADDRESS, directions=[0], coefficients=[0.0])
    assert kernels.gpu._table.cache_info().misses == 3


# On a device only.


def use_all(device, region, values, *, sigma=0.01, iteration=0, directions=(0, 1), dtype=torch.bfloat16):
    target, narrow, master = torch.empty_like(values, dtype=dtype), values.to(dtype), values.clone()
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for kind in NoiseKind:
        address = {"seed": iteration * 2**40, "iteration": iteration, "region": region, "kind": kind}
        noise.perturb(values, target, sigma=sigma, direction=directions[-1], **address)
        for moved in (narrow, master):
            noise.accumulate(moved, coefficients=[0.1] * len(directions), directions=directions, **address)
    add_digest(total, master, region=region)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_kernels_are_compiled_once():
    from shardes.es import digest_gpu
    from shardes.noise import gpu

    def num_compiled():
        kernels = (gpu._perturb, gpu._accumulate, digest_gpu._digest)
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
            for kind in NoiseKind:
                address = {"seed": 1, "iteration": 2 + check, "region": region, "kind": kind}
                noise.perturb(values, target, sigma=0.01, direction=0, **address)
                noise.accumulate(narrow, coefficients=[0.1 + check], directions=[0], **address)
            add_digest(total, narrow, region=region)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.max_memory_allocated() - before < 2**16


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", NoiseKind)
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
