"""The instruments against plain calculations and against what they are said to mean."""

import math

import numpy as np
import pytest

from shardes.es.member import mean_reward
from shardes.es.reward_stats import reward_stats
from shardes.es.shaping import shape


def instruments(layout, *, rewards=None, shaped=None):
    """Of rows of rewards, or of mappings; members' rewards are their means."""
    table = [row if isinstance(row, dict) else dict(enumerate(row)) for row in layout]
    rewards = [mean_reward(list(row.values())) for row in table] if rewards is None else rewards
    shaped = shape(rewards, how="zscore") if shaped is None else shaped
    return reward_stats(table, rewards=rewards, shaped=shaped)


def test_a_case_worked_out_by_hand():
    # Means of members 1 and 3, of prompts 1, 2 and 3; all differences from the sums of these are 1 or 0.
    found = instruments([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [1.0, 3.0, 2.0]])
    # Members: 3 * (1 + 1 + 0) / 2 = 3. Residuals: only member 2 departs, and pulls the prompts' means.
    layout = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [1.0, 3.0, 2.0]])
    rest = layout - layout.mean(1, keepdims=True) - layout.mean(0) + layout.mean()
    assert found["reward_snr"] == pytest.approx(math.sqrt(3 / ((rest**2).sum() / 4)))
    assert found["tied_members"] == 0.0
    assert found["agreed_prompts"] == 0.0
    # Z of rewards 1, 3 and 2 weigh 1, 1 and 0.
    assert found["effective_population"] == pytest.approx(2.0)


def test_the_signal_to_noise_ratio_is_one_of_noise_and_grows_with_the_signal():
    draw = np.random.default_rng(0)
    noise, prompts, members = draw.normal(size=(300, 200)), draw.normal(size=200), draw.normal(size=(300, 1))

    def ratio(signal):
        return instruments((noise + 50 * prompts + signal * members).tolist())["reward_snr"]

    assert ratio(0.0) == pytest.approx(1.0, abs=0.15)
    # A member's mean over 200 prompts has a noise of 1 / sqrt(200): a signal of 3 of these gives sqrt(1 + 9).
    assert ratio(3 / math.sqrt(200)) == pytest.approx(math.sqrt(10), rel=0.15)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        [[0.0, 1.0]],
        [[0.0], [1.0]],
        [[0.0, 1.0], [1.0, None]],
        [{"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 5.0}],
        [[0.1, 0.7, 0.3], [0.2, 0.8, 0.4], [0.4, 1.0, 0.6]],  # alike but for a constant, and rounding
        [[0.5, 0.5], [0.5, 0.5]],
    ],
)
def test_the_signal_to_noise_ratio_is_none_where_it_is_not_defined(layout):
    assert instruments(layout)["reward_snr"] is None


def test_excluded_members_do_not_count():
    layout = [[0.0, 1.0, 2.0], [2.0, 3.0, 4.0], [1.0, 3.0, 2.0]]
    wanted = instruments(layout)
    found = instruments([*layout, [None, 5.0, 1.0]], rewards=[1.0, 3.0, 2.0, None])
    assert found == wanted


def test_members_tie_if_another_has_their_reward():
    assert instruments([[0.0], [0.5], [0.5], [0.25], [0.25]])["tied_members"] == 0.8
    assert instruments([[0.1, 0.3], [0.3, 0.1]])["tied_members"] == 1.0
    assert instruments([[None]])["tied_members"] is None


def test_prompts_are_agreed_on_if_all_who_saw_them_earned_the_same():
    table = [{"a": 1.0, "b": 0.0, "c": 2.0}, {"a": 1.0, "b": 1.0, "d": 4.0}, {"a": 1.0, "b": 1.0, "c": None}]
    assert instruments(table)["agreed_prompts"] == 0.5  # of a and b; one member alone agrees with nobody
    assert instruments([{"a": 1.0}, {"b": 1.0}])["agreed_prompts"] is None
    # Of a, b, c and d, only b tells members apart; what one member alone has seen tells nobody apart.
    assert instruments(table)["informative_prompts"] == 0.25
    assert instruments([{"a": 1.0}, {"b": 1.0}])["informative_prompts"] == 0.0
    assert instruments([{}, {}], rewards=[None, None], shaped=[0.0, 0.0])["informative_prompts"] is None


@pytest.mark.parametrize(
    ("shaped", "wanted"),
    [([0.5, -0.5, 0.5], 3.0), ([0.0, 3.0, 0.0], 1.0), ([1.0, -1.0, 0.0], 2.0), ([3.0, 1.0, 0.0], 1.6)],
)
def test_the_effective_population_counts_whose_weight_matters(shaped, wanted):
    assert instruments([[0.0], [1.0], [2.0]], shaped=shaped)["effective_population"] == wanted


def test_an_update_of_nothing_has_no_effective_population():
    assert instruments([[0.5], [0.5]])["effective_population"] is None
