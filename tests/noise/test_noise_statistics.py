"""The noise has the statistics of ideal noise, and the instruments that say so see what is not ideal."""

import importlib.util
import sys

import numpy as np
import pytest

from shardes.noise import GAUSSIAN, Rademacher
from tests.helpers.noise_oracle import ELEMENTWISE
from tests.helpers.ranks import ROOT


@pytest.fixture(scope="module")
def statistics():
    spec = importlib.util.spec_from_file_location("noise_statistics", ROOT / "tools" / "noise_statistics.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def worst(rows):
    return max(abs(row.deviations) for row in rows)


@pytest.mark.slow
def test_a_hundred_million_normals_are_normal(statistics):
    assert worst(statistics.moments_and_tails(10**8)) < 5
    assert statistics.kolmogorov_smirnov(10**8) < 1.95  # exceeded once in a thousand


@pytest.mark.slow
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_nothing_correlates_with_its_neighbours(statistics, kind):
    assert worst(statistics.correlations(kind, 2_000_000)) < 5
    if kind == Rademacher():
        assert worst(statistics.signs(10**7)) < 5


def test_the_instruments_see_defects(statistics, monkeypatch):
    sample = statistics.sample

    def clipped(*arguments, **changes):
        return np.clip(sample(*arguments, **changes), -3.0, 3.0)

    def forgetting_the_parameter(*arguments, param_id=0, **changes):
        return sample(*arguments, **changes)

    def sharing_a_radius(kind, start, length, **changes):
        values = sample(kind, start, length + 1, **changes)
        return np.abs(values[1:]) * np.sign(values[:-1]) if start % 2 else np.repeat(values, 2)[:length]

    def scaled(*arguments, **changes):
        return sample(*arguments, **changes) * np.float32(1.01)

    for defect, instrument in [
        (clipped, lambda: statistics.moments_and_tails(2_000_000)),
        (scaled, lambda: statistics.moments_and_tails(2_000_000)),
        (forgetting_the_parameter, lambda: statistics.correlations(GAUSSIAN, 10_000)),
        (forgetting_the_parameter, lambda: statistics.correlations(Rademacher(), 10_000)),
        (sharing_a_radius, lambda: statistics.correlations(GAUSSIAN, 10_000)),
    ]:
        monkeypatch.setattr(statistics, "sample", defect)
        assert worst(instrument()) > 5
    monkeypatch.setattr(statistics, "sample", scaled)
    assert statistics.kolmogorov_smirnov(2_000_000) > 1.95
