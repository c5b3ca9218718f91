"""Portions of a batch of problems, and what is known of a member that was not asked all of them."""

import itertools
import math

import pytest

from shardes.rollout.aggregate import PartialResult, joined
from shardes.rollout.choices import ChoiceSet
from shardes.rollout.likelihood import LogLikelihoodAccumulator
from shardes.rollout.prompts import EpisodePlan, PromptBatch
from shardes.rollout.racing import portions_of
from shardes.tasks.base import Choices


@pytest.mark.parametrize(("num_batches", "num_rounds"), [(3, 3), (8, 3), (5, 2), (2, 3), (1, 4)])
def test_portions_are_every_micro_batch_once_and_take_turns(num_batches, num_rounds):
    firsts = set()
    for turn in range(6):
        portions = portions_of(num_batches, num_rounds, turn=turn)
        assert len(portions) == min(num_batches, num_rounds)
        assert sorted(itertools.chain(*portions)) == list(range(num_batches))
        assert max(map(len, portions)) - min(map(len, portions)) <= 1
        firsts.add(tuple(portions[0]))
    assert len(firsts) == min(num_batches, num_rounds)


def test_a_portion_of_a_batch_asks_some_and_keeps_their_indices():
    plan = EpisodePlan(iteration=3, max_context=9, cohorts=[range(4), range(4, 8), range(8, 10)])
    batch = PromptBatch([{}] * 5, [], None, 2, [], episodes=plan)
    portion = batch.portion([0, 2])
    assert (batch.num_batches, portion.num_batches) == (3, 2)
    assert portion.indices() == [0, 1, 2, 3, 8, 9]
    assert batch.problems_of(portion.indices()) == [0, 1, 4]
    assert batch.problems_of([1, 2, 3, 9]) == [1]


CHOICES = ChoiceSet(
    prompts=["a", "b"],
    choices=[Choices(["x", "y"], gold=1), Choices(["x", "y", "z"], gold=0)],
    pairs=[([1], [2])] * 5,
    first_pairs=[0, 2, 5],
)


def judged(*parts):
    return LogLikelihoodAccumulator(CHOICES, metric="log_likelihood", num_samples=2).merge(parts)


def test_a_row_of_which_a_choice_is_not_known_has_no_reward_yet():
    first = PartialResult(indices=[0, 2, 1], values=[-1.0, -2.0, -0.5], num_tokens=3)
    rest = PartialResult(indices=[4, 3], values=[-3.0, -4.0], num_tokens=2)
    early, late = judged(first), judged(first, rest)
    assert (early.rewards, early.is_finite, early.num_tokens) == ([-0.5, None], True, 3)
    assert (late.rewards, late.is_finite, late.num_tokens) == ([-0.5, -2.0], True, 5)
    assert early.result_of(1).by_problem == [-0.5, None]
    assert list(early.samples) == [0]
    batch = PromptBatch([{}] * 2, ["a", "b"], None, 1, [], choices=CHOICES)
    assert batch.problems_of([0, 1, 2, 3]) == [0]


def test_parts_of_ranks_are_joined_in_the_order_of_answers():
    one = PartialResult([3, 0], [0.5, None], [False, True], {"a": [1.0, 2.0]}, 5, True, False, [3, 2], [2, 3])
    other = PartialResult([1], [0.25], [False], {"b": [4.0]}, 7, True, False, [7], [7])
    wanted = PartialResult(
        indices=[0, 1, 3],
        values=[None, 0.25, 0.5],
        has_failed=[True, False, False],
        components={"a": [2.0, None, 1.0], "b": [None, 4.0, None]},
        num_tokens=12,
        turn_tokens=[10, 2],
        lengths=[3, 7, 2],
    )
    assert joined([one, other]) == joined([other, one]) == wanted
    assert joined([]) == PartialResult()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_goes_into_the_journal_as_none(value):
    part = joined([PartialResult(indices=[1, 0], values=[value, -1.0], num_tokens=2)])
    assert (part.values, part.is_finite) == ([-1.0, None], False)
    again = judged(part, PartialResult(indices=[2, 3, 4], values=[-1.0, -1.0, -1.0]))
    assert not again.is_finite
    assert again.result_of(0).reward is None
