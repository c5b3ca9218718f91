"""What a member earns by several answers to a problem, against counting all choices."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.es.member import MemberResult, mean_reward, member_rewards
from shardes.es.objective import (
    MEAN,
    Objective,
    expected_maximum,
    expected_maximum_over_least,
    judge,
    make_objective,
)
from shardes.evaluation.coverage import pass_at_k

# Multiples of 1/8 are exact, so that sums in another order are equal.
values = st.integers(-80, 80).map(lambda n: n / 8)


def brute_force(rewards, k):
    """The mean of the largest over all choices of k, exactly."""
    choices = list(itertools.combinations(map(Fraction, rewards), min(k, len(rewards))))
    return sum(map(max, choices)) / len(choices)


@settings(deadline=None, max_examples=60)
@given(rewards=st.lists(values, min_size=1, max_size=8), k=st.integers(1, 9))
def test_the_expected_best_is_the_mean_over_all_choices(rewards, k):
    found = expected_maximum(rewards, k=k)
    assert found == pytest.approx(float(brute_force(rewards, k)), rel=1e-13, abs=1e-13)
    assert expected_maximum(rewards[::-1], k=k) == found
    if k >= len(rewards):
        assert found == max(rewards)


def test_of_zeros_and_ones_it_is_pass_at_k_to_the_bit():
    for n, k in itertools.product((1, 4, 7, 128), (1, 2, 4, 7)):
        for c in range(0, n + 1, max(1, n // 7)):
            if k <= n:
                assert expected_maximum([1.0] * c + [0.0] * (n - c), k=k) == pass_at_k(n, c, k)


@pytest.mark.parametrize("k", [2, 3])
def test_it_is_unbiased(k):
    """Over all ways to draw 4 answers of 7 with these rewards, its mean is that of the best of k of the 7."""
    rewards = [0.1, 0.7, 0.7, -2.0, 3.0, 0.0, 1.5]
    found = [expected_maximum(drawn, k=k) for drawn in itertools.combinations(rewards, 4)]
    assert math.fsum(found) / len(found) == pytest.approx(float(brute_force(rewards, k)), rel=1e-13)


def test_equal_rewards_stay_what_they_are():
    for size, k in itertools.product(range(1, 9), range(2, 9)):
        assert expected_maximum([0.1] * size, k=k) == 0.1


@settings(deadline=None, max_examples=60)
@given(
    rewards=st.lists(values, max_size=6),
    num_failures=st.integers(0, 4),
    k=st.integers(2, 7),
    below=st.integers(0, 8),
)
def test_failed_answers_count_as_the_least_reward(rewards, num_failures, k, below):
    if not rewards and not num_failures:
        return
    least = min(rewards, default=0.0) - below
    a, b = expected_maximum_over_least(rewards, num_failures, k=k)
    wanted = expected_maximum(rewards + [least] * num_failures, k=k)
    assert a + b * least == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_names_of_objectives():
    assert make_objective("mean", samples_per_prompt=8) is MEAN
    assert make_objective("max", samples_per_prompt=8).best_of == 8
    assert make_objective("pass@4", samples_per_prompt=8).best_of == 4


def of_problem(rewards, objective):
    counted = [Fraction(reward) for reward in rewards if reward is not None]
    if not counted:
        return None
    return sum(counted) / len(counted) if objective.is_mean else brute_force(counted, objective.best_of)


# Answers of a member to three problems, two to each; a failed one, and one that no reward applies to.
ANSWERS = [0.5, 0.25, None, 2.0, None, None]
FAILED = [False, False, True, False, False, True]


@pytest.mark.parametrize("objective", [MEAN, Objective(2)], ids=["mean", "pass@2"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 1.5]], ids=["alike", "weighted"])
def test_a_member_earns_the_weighted_mean(objective, weights):
    judged = judge(ANSWERS, FAILED, samples_per_prompt=2, objective=objective, weights=weights)
    firsts = (0, 2, 4)
    wanted = [of_problem(ANSWERS[first : first + 2], objective) for first in firsts]
    assert judged.by_problem == [None if value is None else float(value) for value in wanted]
    shares = weights or [1.0, 1.0, 1.0]
    # With the mean, each answer counts; otherwise each problem.
    counts = [2, 1, 0] if objective.is_mean else [1, 1, 0]
    total = sum(w * n for w, n in zip(shares, counts, strict=True))
    sums = sum(Fraction(w) * n * (v or 0) for w, n, v in zip(shares, counts, wanted, strict=True))
    assert judged.reward == pytest.approx(float(sums / Fraction(total)), rel=1e-14)


@pytest.mark.parametrize("objective", [MEAN, Objective(2)], ids=["mean", "pass@2"])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 1.5]], ids=["alike", "weighted"])
def test_the_worst_reward_of_all_members_takes_the_place_of_failed_ones(objective, weights):
    judged = judge(ANSWERS, FAILED, samples_per_prompt=2, objective=objective, weights=weights)
    results = [
        MemberResult(0, judged.reward, 2, 9, 3, 0.25, by_least=judged.by_least),
        MemberResult(1, -1.5, 0, 9, 6, -1.5),
    ]
    as_journaled = [MemberResult.of_record(result.record()) for result in results]
    found = member_rewards(as_journaled, on_error="worst")
    # As if the scorer had given the least itself; the answer that no reward applies to stays out.
    replaced = [-1.5 if failed else reward for reward, failed in zip(ANSWERS, FAILED, strict=True)]
    wanted = judge(replaced, FAILED, samples_per_prompt=2, objective=objective, weights=weights).reward
    assert found == [pytest.approx(wanted, rel=1e-14), -1.5]
    assert found[0] < judged.reward
    assert member_rewards(as_journaled, on_error="exclude") == [judged.reward, -1.5]


def test_the_mean_without_weights_is_what_it_was():
    rewards = [0.1, 0.7, None, 0.8, 0.3]
    judged = judge(rewards, [False, False, True, False, False], samples_per_prompt=1)
    assert judged.reward == mean_reward(rewards)
    assert judged.by_least == []
    assert "by_least" not in MemberResult(0, judged.reward, 1, 9).record()
