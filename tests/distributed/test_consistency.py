"""Ranks that are about to do different work are stopped before they do it."""

from dataclasses import dataclass

import pytest
import torch

from shardes.distributed.consistency import check_consistency, shared_settings
from shardes.distributed.group import Group
from tests.helpers.models import make_config


@dataclass(frozen=True)
class FakeGroup(Group):
    """Rank 0 of some; what the others answer is given."""

    others: tuple = ()

    def gather_int64(self, values):
        return [values, *self.others]


class Hashes(list):
    """Catches what a rank would send."""

    def gather_int64(self, values):
        self.append(values)
        return [values]


def hashes(**things):
    caught = Hashes()
    check_consistency(caught, **things)
    return caught[0]


THINGS = {"iteration": 3, "prompts": b"\x01\x02", "coefficients": [0.1, -0.2]}


def test_equal_ranks_agree():
    group = FakeGroup(0, 3, torch.device("cpu"), others=(hashes(**THINGS),) * 2)
    check_consistency(group, **THINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("iteration", 4), ("prompts", b"\x01\x03"), ("coefficients", [0.1, -0.20000000000000004])],
)
def test_a_rank_that_differs_is_named_with_the_thing_and_both_hashes(name, value):
    different = hashes(**{**THINGS, name: value})
    group = FakeGroup(0, 3, torch.device("cpu"), others=(hashes(**THINGS), different))
    with pytest.raises(RuntimeError, match="the ranks of the job disagree") as caught:
        check_consistency(group, **THINGS)
    place = sorted(THINGS).index(name)
    for of, ranks in ((hashes(**THINGS), "0, 1"), (different, "2")):
        assert f"{of[place] % 2**64:016x} on rank(s) {ranks}" in str(caught.value)
    assert [other for other in THINGS if f"{other}:" in str(caught.value)] == [name]


def test_one_rank_agrees_with_itself():
    check_consistency(Group(0, 1, torch.device("cpu")), **THINGS)


def test_settings_are_compared_but_paths_may_differ(tmp_path):
    def settings(name, **changes):
        root = tmp_path / name
        root.mkdir()
        config = make_config(root, model=root / "model", run_dir=root / "run", **changes)
        return shared_settings(config.model_dump())

    one = settings("one")
    assert settings("two") == one, "other paths, equal contents"
    assert settings("three", es__seed=1) != one
    assert settings("four", eval__every=3) != one, "what a resume may change must be the same on all ranks"
