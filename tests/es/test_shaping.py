"""From rewards to coefficients, and schedules, each against a plain calculation."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.config.schema import EsConfig
from shardes.es.member import mean_reward
from shardes.es.schedules import between, factor
from shardes.es.shaping import shape
from shardes.es.strategy import Strategy

HOWS = ["zscore", "centered_rank", "none", "per_prompt"]

# Multiples of 1/64 below a thousand: NumPy's plain sums of them are exact.
values = st.integers(-64_000, 64_000).map(lambda n: n / 64)
rewards_with_gaps = st.lists(st.one_of(st.none(), values), min_size=1, max_size=40)


def update_coefficients(shaped, *, alpha):
    settings = EsConfig(iterations=1, alpha=alpha)
    return Strategy(settings, num_elements=1).update(shaped, iteration=0).coefficients


def test_members_of_a_part_are_evaluated_in_a_row():
    for es, wanted in (
        ({}, [0, 1, 2, 3, 4, 6, 7]),
        ({"subspaces": 3}, [0, 3, 6, 1, 4, 7, 2]),
        ({"subspaces": 2, "antithetic": True}, [0, 1, 4, 2, 3, 6, 7]),
    ):
        strategy = Strategy(EsConfig(iterations=1, population=8, **es), num_elements=1)
        assert strategy.in_order({7, 6, 4, 3, 2, 1, 0}) == wanted


def z_scores(rewards):
    return shape(rewards, how="zscore")


def check_gaps(rewards, shaped, wanted):
    """That excluded members have 0, and the others what is wanted."""
    assert [value for r, value in zip(rewards, shaped, strict=True) if r is None] == [0.0] * rewards.count(
        None
    )
    found = [value for r, value in zip(rewards, shaped, strict=True) if r is not None]
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-13)


# Z scores.


@settings(deadline=None)
@given(rewards=rewards_with_gaps)
def test_z_scores_are_those_of_the_paper_and_0_for_excluded_members(rewards):
    counted = np.array([r for r in rewards if r is not None])
    wanted = (counted - counted.mean()) / (counted.std() + 1e-8) if len(counted) else []
    check_gaps(rewards, z_scores(rewards), wanted)


@settings(deadline=None)
@given(rewards=rewards_with_gaps, alpha=st.floats(1e-6, 10))
def test_coefficients_are_the_step_over_the_population_in_float32(rewards, alpha):
    coefficients = update_coefficients(z_scores(rewards), alpha=alpha)
    assert len(coefficients) == len(rewards)
    assert all(float(np.float32(c)) == c for c in coefficients)
    wanted = (alpha / len(rewards) * np.array(z_scores(rewards))).astype(np.float32)
    assert coefficients == wanted.tolist()


def test_z_scores_of_a_case_worked_out_by_hand():
    # Mean 2, variance (1 + 0 + 1) / 3 = 2/3.
    one = 1 / (math.sqrt(2 / 3) + 1e-8)
    shaped = z_scores([1.0, None, 2.0, 3.0])
    assert shaped == pytest.approx([-one, 0.0, 0.0, one], rel=1e-15)
    assert update_coefficients(shaped, alpha=0.4)[3] == float(np.float32(0.1 * one))


def test_the_bits_of_z_scores_have_not_changed():
    # Journals of earlier runs were written with these.
    wanted = ["-0x1.66de11b3b9183p+0", "0x1.140d48b1a2128p-1", "0x0.0p+0", "0x1.b9aedab5d01ddp-1"]
    assert [value.hex() for value in z_scores([0.1, 0.7, None, 0.8])] == wanted


@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e6])
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_equal_rewards_move_nothing(reward, count):
    for rewards in ([reward] * count, [None, *[reward] * count]):
        table = [{"a": reward, "b": 2 * reward} for _ in rewards]
        for how in ("zscore", "centered_rank", "per_prompt"):
            assert shape(rewards, how=how, table=table) == [0.0] * len(rewards)
    assert update_coefficients([0.0] * count, alpha=1.0) == [0.0] * count


def test_without_any_reward_nothing_moves():
    for how in HOWS:
        assert shape([None, None], how=how, clip=1.0, table=[{"a": 0.5}, {"a": 1.0}]) == [0.0, 0.0]
    assert update_coefficients([0.0] * 3, alpha=1.0) == [0.0] * 3
    assert mean_reward([None, None]) is None
    assert mean_reward([]) is None


def test_the_mean_is_exact_in_any_order():
    rewards = [1e16, 1.0, -1e16, 0.5, None]
    assert {mean_reward(order) for order in itertools.permutations(rewards)} == {0.375}
    assert mean_reward([None, 0.1]) == 0.1


# Ranks, and rewards as they are.


@settings(deadline=None)
@given(rewards=st.lists(st.one_of(st.none(), st.integers(0, 6).map(float)), min_size=1, max_size=20))
def test_centered_ranks_count_who_is_below_and_above(rewards):
    counted = np.array([r for r in rewards if r is not None])
    below = np.array([(counted < r).sum() - (counted > r).sum() for r in counted])
    check_gaps(rewards, shape(rewards, how="centered_rank"), below / (2 * max(len(counted) - 1, 1)))


def test_centered_ranks_of_a_case_worked_out_by_hand():
    assert shape([3.0, None, 1.0, 2.0, 2.0, 9.0], how="centered_rank") == [
        0.25,
        0.0,
        -0.5,
        -0.125,
        -0.125,
        0.5,
    ]
    # Opposite ranks are opposite numbers to the last bit: pairs of an antithetic population cancel.
    ranks = shape([float(n) for n in range(31)], how="centered_rank")
    assert ranks == [-value for value in reversed(ranks)]


def test_rewards_may_be_taken_as_they_are():
    assert shape([0.5, None, -2.0], how="none") == [0.5, 0.0, -2.0]


# Prompt by prompt.


def per_prompt(table, rewards=None, clip=None):
    rewards = [0.0] * len(table) if rewards is None else rewards
    return shape(rewards, how="per_prompt", clip=clip, table=table)


def test_per_prompt_of_a_case_worked_out_by_hand():
    # Centred: a: -1 and 1; b: -0.5, 1 and -0.5; c: 0. Squares sum to 3.5 over 6 answers.
    table = [{"a": 0.0, "b": 10.0}, {"a": 2.0, "b": 11.5, "c": 7.0}, {"b": 10.0, "a": None}]
    std = math.sqrt(3.5 / 6) + 1e-8
    wanted = [-0.75 / std, 2 / 3 / std, -0.5 / std]
    assert per_prompt(table) == pytest.approx(wanted, rel=1e-14)


@settings(deadline=None)
@given(data=st.data(), num_members=st.integers(1, 6), num_prompts=st.integers(1, 5))
def test_per_prompt_is_that_of_eggroll_on_a_full_table(data, num_members, num_prompts):
    cells = st.lists(values, min_size=num_prompts, max_size=num_prompts)
    layout = np.array([data.draw(cells) for _ in range(num_members)])
    centred = layout - layout.mean(axis=0)
    wanted = (centred / (centred.std() + 1e-8)).mean(axis=1)
    table = [dict(enumerate(row.tolist())) for row in layout]
    np.testing.assert_allclose(per_prompt(table), wanted, rtol=1e-9, atol=1e-9 if centred.std() > 1e-3 else 1)


def test_per_prompt_depends_on_no_order_and_not_on_excluded_members():
    draw = random.Random(0)
    ids = [f"prompt {n}" for n in range(9)]
    table = [{p: draw.random() for p in draw.sample(ids, 5)} for _ in range(7)]
    shaped = per_prompt(table)
    shuffled = [dict(draw.sample(list(row.items()), len(row))) for row in reversed(table)]
    assert per_prompt(shuffled) == list(reversed(shaped))
    spoiled = dict.fromkeys(ids, 1e6)
    assert per_prompt([*table, spoiled], rewards=[0.0] * 7 + [None]) == [*shaped, 0.0]
    assert per_prompt([*table, {"prompt 0": None}]) == [*shaped, 0.0]


def test_a_prompt_that_one_member_saw_says_nothing():
    assert per_prompt([{"a": 5.0}, {"b": 7.0}]) == [0.0, 0.0]


def test_per_prompt_wants_a_row_for_each_member():
    with pytest.raises(ValueError, match="wants a table of 2 members; got none"):
        shape([1.0, 2.0], how="per_prompt")
    with pytest.raises(ValueError, match="wants a table of 2 members; got one of 1 members"):
        shape([1.0, 2.0], how="per_prompt", table=[{}])


# Clipping.


@pytest.mark.parametrize("how", HOWS)
def test_clipping_is_the_last_step_and_moves_only_what_is_beyond(how):
    rewards = [0.0, 0.1, None, 0.2, 9.0, -7.0]
    table = [{"a": reward or 0.0} for reward in rewards]
    plain, clipped = shape(rewards, how=how, table=table), shape(rewards, how=how, table=table, clip=0.3)
    assert clipped == [max(-0.3, min(0.3, value)) for value in plain]
    assert max(clipped) == 0.3
    assert min(clipped) == -0.3
    assert clipped != plain


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_prompt_of_weight_w_counts_as_w_prompts(clip):
    table = [{"a": 1.0, "b": 0.5, "c": 0.0}, {"a": 0.25, "c": 2.0}, {"b": None, "c": 1.0}, {"b": -3.0}]
    weights, rewards = {"a": 1, "b": 3, "c": 2}, [1.0, 0.5, None, 0.0]
    repeated = [
        {(prompt, copy): reward for prompt, reward in row.items() for copy in range(weights[prompt])}
        for row in table
    ]
    wanted = shape(rewards, how="per_prompt", table=repeated, clip=clip)
    assert shape(rewards, how="per_prompt", table=table, weights=weights, clip=clip) == pytest.approx(wanted)
    same = [{"a": 0.1}, {"a": 0.1}]
    assert shape([0.1, 0.1], how="per_prompt", table=same, weights={"a": 2.0}) == [0.0, 0.0]


# Schedules.


def factors(schedule, num_iterations=4, **changes):
    return [
        factor(schedule, iteration=t, num_iterations=num_iterations, **changes) for t in range(num_iterations)
    ]


def test_schedules_go_from_one_to_nothing():
    assert factors("constant") == [1.0] * 4
    assert factors("linear") == [1.0, 0.75, 0.5, 0.25]
    assert factors("cosine") == pytest.approx([1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4], rel=1e-15)
    assert factors("cosine")[0] == 1.0


def test_the_bits_of_a_falling_step_have_not_changed():
    for total, t in itertools.product((1, 3, 7, 500), range(500)):
        if t < total:
            found = 5e-4 * factor("linear", iteration=t, num_iterations=total)
            assert found == 5e-4 * (1 - t / total)
    assert 5e-4 * factor("constant", iteration=3, num_iterations=7) == 5e-4


def test_warm_up_multiplies_the_first_iterations():
    assert factors("constant", warmup_iterations=3) == [0.25, 0.5, 0.75, 1.0]
    assert factors("linear", warmup_iterations=1) == [0.5, 0.75, 0.5, 0.25]
    assert factors("cosine", warmup_iterations=9)[2] == pytest.approx(0.5 * 0.3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [1e-4, 5e-3, 1e-3])
def test_a_value_goes_from_its_start_to_its_end(schedule, final):
    start, total = 1e-3, 50
    found = [
        between(start, final, schedule=schedule, iteration=t, num_iterations=total) for t in range(total + 1)
    ]
    assert found[0] == start
    assert found[-1] == final
    shares = [factor(schedule, iteration=t, num_iterations=total) for t in range(total + 1)]
    assert found == pytest.approx([final * (1 - share) + start * share for share in shares])
    assert sorted(found, reverse=final < start) == found


def test_a_constant_value_stays_where_it_starts():
    found = {between(0.1, 0.7, schedule="constant", iteration=t, num_iterations=9) for t in range(9)}
    assert found == {0.1}
