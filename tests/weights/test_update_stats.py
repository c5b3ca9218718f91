"""The norms of an update are the same, however many elements are summed at a time."""

import pytest
import torch

from shardes.weights.update_stats import NUM_AT_ONCE, UpdateStats


@pytest.mark.parametrize("size", [1, NUM_AT_ONCE["cpu"], 2 * NUM_AT_ONCE["cpu"] + 3])
def test_sums_are_those_of_whole_vectors(size):
    generator = torch.Generator().manual_seed(size)
    step, before, last, base = (torch.randn(size, generator=generator) for _ in range(4))
    after = before + step
    stats = UpdateStats(torch.device("cpu"))
    stats.add(step, before=before, after=after, last_step=last, base=base)
    stats.add(step, before=before, after=after, last_step=None, base=base)
    moved, away = after.double() - before.double(), after.double() - base.double()
    step, last = step.double(), last.double()
    wanted = [2 * step @ step, 2 * moved @ moved, 2 * step @ moved, last @ last, step @ last, 2 * away @ away]
    assert stats.sums() == pytest.approx([float(each) for each in wanted], rel=1e-12)
