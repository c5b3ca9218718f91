"""Members that are used again: the estimate against the gradient, and the weights against brute force."""

import math

import numpy as np
import pytest
import torch

from shardes import noise
from shardes.config.schema import EsConfig
from shardes.es.reuse import reuse
from shardes.es.strategy import Strategy
from shardes.es.update import Update
from shardes.noise import Region


def estimate(rewards, eps, logs, *, moved, least_share):
    """The gradient times sigma, from members whose noise is relative to a centre that has moved."""
    found = reuse(rewards.tolist(), logs.tolist(), least_share=least_share)
    values = np.array(found.values)
    assert abs(values.sum()) < 1e-12, "so that the common part of the members' noise drops out"
    return values @ (eps - moved), found


def test_the_estimate_is_that_of_the_gradient_at_the_centre_of_now():
    # R(x) = b x - x A x / 2, whose smoothed gradient at a point is b - A x: sigma times that is estimated.
    draw, sigma, count = np.random.default_rng(0), 0.3, 20_000
    b, a = np.array([1.0, -2.0, 0.5]), np.diag([3.0, 1.0, 4.0])
    old, now = np.array([0.2, 0.1, -0.3]), np.array([0.3, 0.03, -0.12])
    moved = (now - old) / sigma
    eps = draw.normal(size=(count, 3))
    members = old + sigma * eps
    rewards = members @ b - np.einsum("ni,ij,nj->n", members, a, members) / 2
    logs = eps @ moved  # and a constant
    error = 4 * rewards.std() * np.exp(moved @ moved / 2) / math.sqrt(count)
    found, reused = estimate(rewards, eps, logs, moved=moved, least_share=0.0)
    np.testing.assert_allclose(found, sigma * (b - a @ now), atol=error)
    # Of normal weights, the effective share is exp(-|Delta|^2 / sigma^2).
    assert reused.exponent == 1.0
    assert reused.effective_members == reused.exact_effective_members
    assert reused.effective_members / count == pytest.approx(math.exp(-moved @ moved), rel=0.1)
    # Equal weights give the gradient where the members were, which is another one here.
    stale, reused = estimate(rewards, eps, logs, moved=moved, least_share=1.0)
    np.testing.assert_allclose(stale, sigma * (b - a @ old), atol=error)
    assert (reused.effective_members, reused.exponent) == (count, 0.0)
    assert np.abs(found - stale).max() > 2 * error


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_weights_are_flattened_as_little_as_leaves_enough_members(share):
    logs = np.random.default_rng(1).normal(size=20) * 400
    found = reuse([float(i) for i in range(20)], logs.tolist(), least_share=share)
    assert found.effective_members == pytest.approx(20 * share, rel=1e-6)
    assert found.exact_effective_members == pytest.approx(1.0)

    def effective(power):
        weights = np.exp(power * (logs - logs.max()))
        return weights.sum() ** 2 / (weights**2).sum()

    assert effective(found.exponent) == pytest.approx(found.effective_members)
    if share < 1:
        assert effective(found.exponent * 1.001) < 20 * share


def test_members_without_a_reward_have_no_part():
    shaped, logs = [1.0, -0.5, 2.0, 0.25], [0.3, -0.2, 0.9, 0.0]
    wanted = reuse(shaped, logs, least_share=0.8)
    found = reuse([1.0, None, -0.5, 2.0, 0.25], [0.3, 99.0, -0.2, 0.9, 0.0], least_share=0.8)
    assert found.values == [wanted.values[0], 0.0, *wanted.values[1:]]
    assert found.stats() == wanted.stats()
    assert reuse([None, None], [0.0, 1.0], least_share=0.5).values == [0.0, 0.0]


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_weights_are_those_of_the_noise_itself(antithetic):
    # With d weights the products of directions are within about sqrt(d) of their means.
    count, sigma, alpha, region = 1 << 18, 0.01, 1e-6, Region(3, 1 << 18, 0, 1 << 18)
    settings = EsConfig(
        iterations=9, population=8, antithetic=antithetic, member_reuse=0.0, sigma=sigma, alpha=alpha
    )
    strategy, draw = Strategy(settings, num_elements=count), np.random.default_rng(2)
    shaped = draw.normal(size=8).tolist()
    last = strategy.update(shaped, iteration=4)
    found = strategy.reused(past=[{**last.record(), "shaped": shaped}])

    def noise_of(coefficients, directions):
        total = torch.zeros(count)
        noise.accumulate(
            total, region=region, coefficients=coefficients, directions=directions, seed=0, iteration=4
        )
        return total.double().numpy()

    step = noise_of(last.coefficients, range(len(last.coefficients)))
    members = [strategy.perturbation(n, iteration=4) for n in range(8)]
    logs = [noise_of([1.0], [p.direction]) @ step / p.sigma for p in members]
    assert np.ptp(logs) > 5
    wanted = reuse(shaped, logs, least_share=0.0)
    np.testing.assert_allclose(found.values, wanted.values, atol=0.02)
    assert found.effective_members == pytest.approx(wanted.effective_members, rel=0.05)
    assert found.effective_members < 7


def test_the_coefficients_of_both_iterations():
    settings = EsConfig(iterations=9, population=3, member_reuse=1.0, alpha=0.5, max_update_norm=1e9)
    strategy = Strategy(settings, num_elements=5)
    assert strategy.reused(past=[]) is None
    past = [{"iteration": 0, "coefficients": [0.1, 0.2, 0.3], "shaped": [0.0, 0.0, 0.0]}]
    assert strategy.reused(past=past) is None, "they say nothing"
    past[0]["shaped"] = [2.0, None, -1.0]
    reused = strategy.reused(past=past)
    update = strategy.update([1.0, 0.0, -1.0], iteration=1, reused=reused)
    # Three members and two again: each has a fifth of alpha. The rewards of those two are centred.
    assert update.coefficients == [float(np.float32(0.5 / 5 * z)) for z in (1.0, 0.0, -1.0)]
    assert update.reused == tuple(float(np.float32(0.5 / 5 * z)) for z in (1.5, 0.0, -1.5))
    assert update.terms == [(1, update.coefficients), (0, update.reused)]
    assert Update.of_record(update.record()) == update
    short = Strategy(settings.model_copy(update={"max_update_norm": 0.01}), num_elements=5)
    both = short.update([1.0, 0.0, -1.0], iteration=1, reused=reused)
    length = math.sqrt(5 * sum(c**2 for _, terms in both.terms for c in terms))
    assert length == pytest.approx(0.01, rel=1e-6)


def test_updates_without_such_members_are_as_they_were():
    plain = {"iteration": 2, "coefficients": [0.5, -0.25], "alpha": 0.1}
    for record in (plain, plain | {"noise_iteration": 1}):
        update = Update.of_record(record)
        assert update.record() == record
        assert update.terms == [(record.get("noise_iteration", 2), [0.5, -0.25])]
