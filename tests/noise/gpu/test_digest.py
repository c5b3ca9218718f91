"""The GPU kernel of the weights digest against its definition."""

import pytest
import torch

from shardes.noise import Region
from tests.helpers.noise_oracle import FORMATS
from tests.noise.gpu.checks import (
    EMPTY_REGIONS,
    EXTREMES,
    FEW_REGIONS,
    REGIONS,
    SIZE,
    digest_of,
    reference_digest,
    values_for,
)

pytest.importorskip("triton")


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
