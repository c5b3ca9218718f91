"""Noise that covers a part of the parameters: its definition, and the CPU kernels against it bit for bit."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shardes import noise
from shardes.noise import GAUSSIAN, Rademacher, Region, definition
from shardes.noise.kinds.gaussian import Gaussian
from shardes.noise.parts import LARGE_BLOCK, LARGE_PARAMETER, Parts
from tests.helpers.noise_oracle import IN_PARTS, accumulated, covered, perturbed, restored, same_bits

HERE = Path(__file__)
DOCUMENTATION = HERE.parents[2] / "docs" / "noise.md"
GOLDEN = json.loads((HERE.parent / "golden_noise.json").read_text())["parts"]
SIZE = 2**34
SMALL, LARGE = LARGE_PARAMETER - 1, LARGE_PARAMETER
REGIONS = [
    *(
        Region(7, SMALL, start, length)
        for start, length in [(0, 0), (0, 1), (511, 2), (7, 5000), (900_000, 9000)]
    ),
    Region(7, SMALL, 3, 7, rows=9, stride=40),
    Region(7, SMALL, 100, 700, rows=9, stride=3000),
    Region(7, LARGE, 5, 30_000),
    Region(7, SIZE, SIZE - 9000, 9000),
    Region(7, SIZE, 2**33 + 3, 1300, rows=20, stride=2**24 + 4000),
    Region(7, SIZE, 9, 5, rows=0, stride=5),
]
ADDRESS = {"seed": 2**40 + 5, "iteration": 3}
UPDATE = {"directions": [0, 5, 2, 9, 1, 1, 3], "coefficients": [0.5, -0.25, 1e-3, 0.0, 0.3, 0.4, 0.5]}
# Few, for each pair is compiled; the conversions themselves are test_noise's.
FORMATS = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_the_definition_has_not_drifted(case):
    address = {key: value for key, value in case.items() if key != "shifts"}
    assert definition.part_shifts(**address).tolist() == case["shifts"]


def test_the_example_of_the_documentation():
    shifts = definition.part_shifts(first=0, count=6, num_parts=4, seed=1, iteration=2, param_id=4).tolist()
    blocks = [
        Gaussian(4)
        .covers(
            param_size=SMALL, start=0, length=24 * 512, seed=1, iteration=2, param_id=4, direction=direction
        )[::512]
        .nonzero()[0]
        .tolist()
        for direction in (3, 7)
    ]
    assert blocks[0] == blocks[1]
    text = " ".join(DOCUMENTATION.read_text().split())
    assert f"`{', '.join(map(str, shifts))}`" in text
    assert f"blocks `{', '.join(map(str, blocks[0]))}`" in text


def test_each_part_has_one_block_of_every_group_and_they_change_with_the_iteration():
    parts, address = Parts(5, 512), {"seed": 3, "param_id": 1, "start": 0, "length": 5 * 512 * 40}
    owners = []
    for iteration in (0, 1):
        covers = np.stack([parts.covers(direction=d, iteration=iteration, **address) for d in range(5)])
        assert (covers.sum(0) == 1).all()
        by_block = covers.reshape(5, 40, 5, 512)
        assert (by_block == by_block[..., :1]).all()
        assert (by_block[..., 0].sum(2) == 1).all()
        owners.append(covers.argmax(0)[::512])
    # A fifth of the blocks stays by chance; all shifts occur about equally often.
    assert 0.05 < (owners[0] == owners[1]).mean() < 0.4
    shifts = definition.part_shifts(first=0, count=40_000, num_parts=5, seed=3, iteration=0, param_id=1)
    assert np.abs(np.bincount(shifts, minlength=5) / 8000 - 1).max() < 0.05


def test_the_noise_of_a_member_has_a_mean_square_of_one():
    sample = {"start": 0, "length": 2**20, "seed": 3, "iteration": 0, "param_id": 1}
    for kind in (Gaussian(4), Rademacher(4)):
        squares = []
        for direction in range(4):
            eps, covers = (
                kind.eps(direction=direction, **sample),
                kind.covers(direction=direction, param_size=SMALL, **sample),
            )
            squares.append(float((np.where(covers, kind.part_scale * eps, 0).astype(np.float64) ** 2).mean()))
        assert np.allclose(squares, 1, atol=0.02)
        assert kind.largest == 2 * type(kind)().largest


def test_large_parameters_have_larger_blocks():
    for kind, block in ((Gaussian(2), 512), (Rademacher(2), 2048)):
        assert kind.parts_of(SMALL) == Parts(2, block)
        assert kind.parts_of(LARGE) == Parts(2, LARGE_BLOCK)
        assert type(kind)().parts_of(LARGE) is None


@pytest.mark.parametrize("kind", IN_PARTS, ids=repr)
def test_members_and_their_restoring_equal_the_oracle(kind):
    for region, (source_dtype, target_dtype) in itertools.product(REGIONS, FORMATS):
        source = torch.linspace(-2, 2, region.num_elements).to(source_dtype)
        source[::7] = -0.0
        before = torch.full_like(source, 9.0, dtype=target_dtype)
        for direction in (0, 1, 2, 66):
            where = {"region": region, "kind": kind, "direction": direction, **ADDRESS}
            target = before.clone()
            noise.perturb(source, target, sigma=0.01, **where)
            assert same_bits(target, perturbed(source, target_dtype, sigma=0.01, before=before, **where)), (
                where
            )
            noise.restore(source, target, **where)
            assert same_bits(target, restored(source, before, **where)), where


@pytest.mark.parametrize("kind", IN_PARTS, ids=repr)
def test_updates_equal_the_oracle(kind):
    for region, dtype in itertools.product(REGIONS, (torch.float32, torch.bfloat16)):
        master = torch.linspace(-1, 1, region.num_elements).to(dtype)
        arguments = {"region": region, "kind": kind, **UPDATE, **ADDRESS}
        wanted = accumulated(master, **arguments)
        noise.accumulate(master, **arguments)
        assert same_bits(master, wanted), region


def test_without_parts_everything_is_restored():
    source, target = torch.arange(9.0), torch.zeros(9)
    noise.restore(source, target, region=Region(0, 9, 0, 9), direction=3, kind=GAUSSIAN, **ADDRESS)
    assert same_bits(source, target)


def test_threads_do_not_change_a_bit():
    values = torch.randn(400_001, generator=torch.Generator().manual_seed(0))
    region, threads, results = Region(0, SMALL, 77, 400_001), torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            target, master = torch.zeros_like(values), values.clone()
            where = {"region": region, "kind": Gaussian(2), **ADDRESS}
            noise.perturb(values, target, sigma=0.1, direction=1, **where)
            noise.restore(values, target, direction=0, **where)
            noise.accumulate(master, **UPDATE, **where)
            results.append((target, master))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_as_many_parts_as_a_word_can_draw():
    for wrong in (0, 2**16):
        with pytest.raises(ValueError, match=f"got {wrong} parts; wanted 1 to 65535"):
            Gaussian(wrong)
    region = Region(3, SMALL, 0, 70_000)
    where = {"region": region, "kind": Gaussian(2**16 - 1), "direction": 0, **ADDRESS}
    assert covered(**where).sum() <= 512
