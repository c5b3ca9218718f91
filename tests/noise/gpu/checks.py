"""The GPU kernels, imported for a device or for Triton's interpreter, and compared with definitions."""

import functools
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shardes import noise
from shardes.noise import Region
from shardes.noise.definition import MAX_ELEMENTS, MAX_PARAM_ID, SIGN_BLOCK
from shardes.noise.kinds import base
from shardes.weights.digest import add_digest
from tests.helpers.noise_oracle import accumulated, added, perturbed, restored, same_bits

HAS_CUDA = torch.cuda.is_available()
MODULES = {
    "gpu_math": "shardes.noise.gpu_math",
    "gpu": "shardes.noise.gpu",
    "gaussian_gpu": "shardes.noise.kinds.gaussian.gpu",
    "rademacher_gpu": "shardes.noise.kinds.rademacher.gpu",
    "parts_gpu": "shardes.noise.parts.gpu",
    "low_rank_gpu": "shardes.noise.kinds.low_rank.gpu",
    "digest_gpu": "shardes.weights.digest_gpu",
}

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
    held = {name: sys.modules.pop(name, None) for name in MODULES.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        try:
            return SimpleNamespace(**{key: importlib.import_module(name) for key, name in MODULES.items()})
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


def use_for_cpu(monkeypatch, modules):
    """Have the noise on a CPU use these modules' kernels."""
    by_name = {name: getattr(modules, key) for key, name in MODULES.items()}
    monkeypatch.setattr(base, "kernels", lambda package, device: by_name[f"{package}.gpu"])


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
    before = torch.full_like(source, -7, dtype=target_dtype)
    target = Framed(before, kernels.device)
    noise.perturb(centre.values, target.values, **arguments)
    assert same_bits(target.result(), perturbed(source, target_dtype, before=before, **arguments)), arguments
    assert same_bits(centre.result(), source)


def check_restore(kernels, source, target_dtype, **arguments):
    before = torch.full_like(source, -7, dtype=target_dtype)
    centre, target = Framed(source, kernels.device), Framed(before, kernels.device)
    noise.restore(centre.values, target.values, **arguments)
    assert same_bits(target.result(), restored(source, before, **arguments)), arguments
    assert same_bits(centre.result(), source)


def check_accumulate(kernels, values, **arguments):
    master = Framed(values, kernels.device)
    noise.accumulate(master.values, **arguments)
    assert same_bits(master.result(), accumulated(values, **arguments)), arguments


def check_add(kernels, values, delta, **arguments):
    master, moved_by = Framed(values, kernels.device), Framed(delta, kernels.device)
    noise.add(master.values, moved_by.values, **arguments)
    assert same_bits(master.result(), added(values, delta, **arguments)), arguments
    assert same_bits(moved_by.result(), delta)


def values_for(region, dtype, limit=2.0):
    return torch.linspace(-limit, limit, region.num_elements).to(dtype)


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
