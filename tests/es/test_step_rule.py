"""The step rule: what it estimates, against brute force and against what it is said to mean."""

import itertools
import json
import math

import numpy as np
import pytest

from shardes.config.schema import EsConfig
from shardes.es.member import mean_reward
from shardes.es.reward_stats import reward_stats
from shardes.es.shaping import shape
from shardes.es.step_rule import WINDOW, reliability, step_factor
from shardes.es.strategy import Strategy


def ratio_of(layout):
    table = [dict(enumerate(row)) for row in layout.tolist()]
    rewards = [mean_reward(list(row.values())) for row in table]
    return reward_stats(table, rewards=rewards, shaped=shape(rewards, how="zscore"))["reward_snr"]


def test_it_is_the_mean_of_the_split_half_reliabilities_of_all_halves():
    layout = np.random.default_rng(3).normal(size=(12, 6)) + np.linspace(-1, 1, 12)[:, None]
    found = []
    for half in itertools.combinations(range(6), 3):
        first, second = layout[:, half].sum(1), layout[:, [p for p in range(6) if p not in half]].sum(1)
        found.append(4 * np.cov(first, second)[0, 1] / (first + second).var(ddof=1))
    assert reliability([ratio_of(layout)]) == pytest.approx(np.mean(found), rel=1e-5)


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.3])
def test_it_is_the_squared_correlation_with_the_rewards_on_all_problems(signal):
    draw = np.random.default_rng(0)
    share = signal**2 / (signal**2 + 1 / 25)  # a member's mean over 25 problems has a variance of 1 / 25
    ratios, products = [], []
    for _ in range(200):
        own = draw.normal(size=32)
        layout = signal * own[:, None] + draw.normal(size=(32, 25)) + draw.normal(size=25)
        ratios.append(ratio_of(layout))
        shaped = np.array(shape(layout.mean(1).tolist(), how="zscore"))
        wanted = np.array(shape(own.tolist(), how="zscore"))
        products.append(shaped @ wanted / 32)
    # The mean of bounded shares is a little too small.
    assert share - 0.05 < reliability(ratios) < share + 0.02
    # The multiple of Z that is nearest to the Z of all problems: <Z, wanted> / <Z, Z>, and <Z, Z> is N.
    assert step_factor(reliability(ratios)) == pytest.approx(max(np.mean(products), 0.1), abs=0.06)


def test_what_was_not_measured_does_not_count():
    assert reliability([]) is reliability([None, None]) is None
    assert reliability([None, 2.0]) == reliability([2.0]) == pytest.approx(0.75)
    assert reliability([0.0]) == reliability([0.9]) == 0.0
    assert (step_factor(None), step_factor(0.0), step_factor(0.25), step_factor(1.0)) == (1.0, 0.1, 0.5, 1.0)


def test_last_bits_of_a_ratio_do_not_matter():
    assert reliability([1.7]) == reliability([math.nextafter(1.7, 2)])


def test_alpha_follows_from_the_last_records_as_json_has_them():
    strategy = Strategy(EsConfig(iterations=50, alpha=0.4, step_rule="reliability"), num_elements=9)
    draw = np.random.default_rng(1)
    past = [{"instruments": {"reward_snr": float(value)}} for value in draw.uniform(1, 3, 20)]
    past[14:16] = {"instruments": {}}, {}  # before the journal had the instrument
    factor, measured = strategy.alpha_factor({"reward_snr": 1.5}, past=past)
    ratios = [*(r.get("instruments", {}).get("reward_snr") for r in past[-WINDOW + 1 :]), 1.5]
    shares = [ratio**2 / (1 + ratio**2) for ratio in ratios if ratio is not None]
    assert len(shares) == WINDOW - 2
    wanted = 2 - 1 / np.mean(shares)
    assert measured == {"reward_reliability": pytest.approx(wanted, rel=1e-5)}
    assert factor == pytest.approx(math.sqrt(wanted), rel=1e-5)
    for same in (past[-WINDOW + 1 :], json.loads(json.dumps(past))):
        assert strategy.alpha_factor({"reward_snr": 1.5}, past=same) == (factor, measured)
    update = strategy.update([1.0, -1.0], iteration=3, alpha_factor=factor)
    assert update.alpha == 0.4 * factor
    assert update.coefficients == [float(np.float32(0.2 * factor)), float(np.float32(-0.2 * factor))]


def test_no_rule_changes_no_step():
    assert Strategy(EsConfig(iterations=1), num_elements=1).alpha_factor({}, past=[]) == (1.0, {})
