"""Racing as pure functions, against answers worked out by brute force."""

import itertools
import math
import random

import numpy as np
import pytest

from shardes.config.es import RacingConfig
from shardes.es.racing import (
    Round,
    advance,
    begin,
    estimated,
    going_on,
    relative_error,
    residual_variance,
)

HALF = RacingConfig(keep=0.5)


def wanted_to_go_on(rewards, racing, *, keep, antithetic):
    """Tries every set of members that may stop, and returns all but the one nearest the middle."""
    units = [(m, m + 1) for m in racing if m % 2 == 0] if antithetic else [(m,) for m in racing]
    units = [unit for unit in units if all(m in racing and rewards[m] is not None for m in unit)]
    num_going = min(len(units), max(2, math.ceil(keep * len(units))))
    num_stopping = len(units) - num_going

    def badness(stopping):
        if antithetic:
            return sum(abs(rewards[a] - rewards[b]) for a, b in stopping)
        kept = sorted(rewards[m] for (m,) in units if (m,) not in stopping)
        low, high = kept[: num_going // 2], kept[num_going // 2 :]
        return sum(low) - sum(high)  # the farther apart the two halves are, the better

    best = min(itertools.combinations(units, num_stopping), key=badness)
    return sorted(set(racing) - {m for unit in best for m in unit})


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.75, 0.99])
def test_those_farthest_from_the_middle_go_on(antithetic, keep):
    draws, settings = random.Random(int(keep * 100)), RacingConfig(keep=keep)
    for _ in range(30):
        rewards = [draws.gauss(0, 1) if draws.random() > 0.15 else None for _ in range(12)]
        units = [m for m in range(0, 12, 2) if draws.random() > 0.2]
        racing = sorted(m + i for m in units for i in (0, 1))
        found = going_on(rewards, racing, settings=settings, antithetic=antithetic)
        assert found == wanted_to_go_on(rewards, racing, keep=keep, antithetic=antithetic)
        limited = going_on(rewards, racing, settings=settings, antithetic=antithetic, most_stopping=1)
        assert set(found) <= set(limited)
        assert len(racing) - len(limited) == min(len(racing) - len(found), 2 if antithetic else 1)


def test_ties_are_broken_by_the_number_of_the_member():
    assert going_on([0.5] * 7, range(7), settings=HALF, antithetic=False) == [0, 1, 5, 6]
    assert going_on([0.5] * 8, range(8), settings=HALF, antithetic=True) == [0, 1, 2, 3]


def test_a_reward_that_is_not_known_is_read_off_the_line_of_those_that_are():
    draws = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.9):
        old = draws.normal(size=9)
        new = {m: float(draws.normal() + 0.6 * old[m]) for m in (0, 3, 4, 8)}
        slope, offset = np.polyfit([old[m] for m in new], list(new.values()), 1)
        slope = min(max(slope, share), 1)
        offset = np.mean(list(new.values())) - slope * np.mean([old[m] for m in new])
        found = estimated(list(old), new, share=share)
        assert found == pytest.approx([new.get(m, offset + slope * old[m]) for m in range(9)], abs=1e-12)
        assert {m: found[m] for m in new} == new, "what is known is not computed"


def test_lines_of_too_few_points_shift_alone_and_none_stays_none():
    assert estimated([1.0, 2.0, None, 5.0], {0: 3.0}, share=0.5) == [3.0, 4.0, None, 7.0]
    assert estimated([1.0, 1.0, 4.0], {0: 2.0, 1: 3.0}, share=0.5) == [2.0, 3.0, 5.5]
    assert estimated([1.0, None, 4.0], {0: None, 1: 3.0}, share=0.5) == [None, 3.0, 4.0]
    huge = estimated([1e308, -1e308, 0.0], {0: 1e308, 1: -1e308}, share=0.5)
    assert huge == [1e308, -1e308, 0.0]


def test_estimates_are_not_biased_by_who_went_on():
    """Members in the middle are judged on an easy portion alone; on average nothing of that is left."""
    draws, shifts, errors = np.random.default_rng(1), [], []
    for _ in range(400):
        signal = draws.normal(size=16)
        answers = signal[:, None] + draws.normal(size=(16, 8)) + np.r_[np.full(4, 3.0), np.zeros(4)]
        first, true = answers[:, :4].mean(1), answers.mean(1)
        going = going_on(list(first), range(16), settings=HALF, antithetic=False)
        found = estimated(list(first), {m: true[m] for m in going}, share=0.5)
        stopped = sorted(set(range(16)) - set(going))
        shifts.append(np.mean([found[m] - true[m] for m in stopped]))
        errors.append(np.mean([(found[m] - true[m]) ** 2 for m in stopped]))
    assert abs(np.mean(shifts)) < 4 * np.std(shifts) / 20
    assert np.std(shifts) / 20 < 0.02
    assert np.mean(errors) < 1.0 * (1 / 4 - 1 / 8) * 1.3, "about what the missing answers would change"


def two_way_residual(table):
    table = np.array(table)
    fitted = table.mean(0)[None] + table.mean(1)[:, None] - table.mean()
    return ((table - fitted) ** 2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1))


def test_the_residual_variance_is_that_of_the_complete_columns():
    table = np.random.default_rng(2).normal(size=(5, 7))
    rows = [[None if (m, p) == (2, 3) or p == 6 else float(table[m, p]) for p in range(7)] for m in range(5)]
    assert residual_variance(rows) == pytest.approx(two_way_residual(table[:, [0, 1, 2, 4, 5]]))
    assert residual_variance(rows[:1]) is None
    assert residual_variance([[1.0, None], [2.0, None]]) is None
    assert residual_variance([[1e300, -1e300], [-1e300, 1e300]]) is None
    assert residual_variance([]) is None


def run(answers, *, antithetic=False, **settings):
    """Races members whose answers are known; returns how it stands after each round."""
    settings = RacingConfig(**settings)
    num_members, num_problems = answers.shape
    cuts = [round(num_problems * i / settings.rounds) for i in range(settings.rounds + 1)]
    standing, found = begin(num_members), []
    for before, after in itertools.pairwise(cuts):
        rows = {m: [float(v) for v in answers[m, :after]] for m in standing.racing}
        missing = [None] * (num_problems - after)
        state = Round(
            earned={m: math.fsum(row) / after for m, row in rows.items()},
            by_problem=[row + missing for row in rows.values()],
            broken=[],
            asked_before=before / num_problems,
            asked=after / num_problems,
        )
        standing = advance(standing, state, settings=settings, antithetic=antithetic)
        found.append(standing)
    return found


@pytest.mark.parametrize("antithetic", [False, True])
def test_without_a_limit_as_many_go_on_as_are_to_be_kept(antithetic):
    answers = np.random.default_rng(3).normal(size=(32, 24))
    found = run(answers, rounds=3, keep=0.5, antithetic=antithetic)
    assert [len(standing.racing) for standing in found] == [16, 8, 8]
    last = found[-1]
    for member in last.racing:
        assert last.rewards[member] == math.fsum(answers[member]) / 24
    assert set(found[1].racing) <= set(found[0].racing)


def test_a_race_of_which_nobody_stops_changes_nothing():
    answers = np.random.default_rng(4).normal(size=(5, 12))
    found = run(answers, rounds=4, keep=0.99)
    assert [list(standing.racing) for standing in found] == [list(range(5))] * 4
    assert found[-1].rewards == [math.fsum(row) / 12 for row in answers.tolist()]
    assert relative_error(found[-1], antithetic=False) == 0.0


@pytest.mark.parametrize("antithetic", [False, True])
def test_what_racing_is_said_to_change_is_about_what_it_changes(antithetic):
    draws, told, true = np.random.default_rng(5), [], []
    for _ in range(100):
        answers = draws.normal(size=(32, 1)) + 2 * draws.normal(size=(32, 24)) + draws.normal(size=(1, 24))
        (_, last) = run(answers, rounds=2, keep=0.5, antithetic=antithetic)
        told.append(relative_error(last, antithetic=antithetic))
        change, length = squared(last.rewards, answers.mean(1), antithetic=antithetic)
        true.append(np.sqrt(change / length))
    # It is told for the mean of what was answered; the line does a little better than that.
    assert 0.75 < np.mean(true) / np.mean(told) < 1.05


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_tolerance_holds_back_those_whose_answers_would_change_more(antithetic):
    draws, keys = np.random.default_rng(6), {"rounds": 3, "keep": 0.25, "antithetic": antithetic}
    populations = [draws.normal(size=(16, 1)) + 2 * draws.normal(size=(16, 24)) for _ in range(40)]
    free = [len(run(answers, **keys)[-1].racing) for answers in populations]
    held = {}
    for tolerance in (1e-6, 0.2, 0.35, 100.0):
        lasts = [run(answers, **keys, tolerance=tolerance)[-1] for answers in populations]
        held[tolerance] = np.mean([len(last.racing) for last in lasts])
        true = [
            squared(last.rewards, answers.mean(1), antithetic=antithetic)
            for last, answers in zip(lasts, populations, strict=True)
        ]
        changed = math.sqrt(np.mean([change for change, _ in true]) / np.mean([length for _, length in true]))
        if tolerance < 1:
            assert tolerance * 0.6 < changed < tolerance or held[tolerance] == 16
    assert held[1e-6] == 16 > held[0.2] > held[0.35] > held[100.0]
    assert held[100.0] == pytest.approx(np.mean(free), abs=0.2)


def squared(rewards, full, *, antithetic):
    """The squared change of the contrasts, and their squared length with all answers."""
    found, full = np.array(rewards), np.array(full)
    if antithetic:
        found, full = found[::2] - found[1::2], full[::2] - full[1::2]
    else:
        found, full = found - found.mean(), full - full.mean()
    return ((found - full) ** 2).sum(), (full**2).sum()


def test_who_cannot_be_compared_goes_on_and_who_is_broken_stops():
    state = Round(
        earned={0: 1.0, 1: None, 2: 3.0, 3: None, 4: 5.0, 5: 6.0, 6: 2.0, 7: 2.0},
        by_problem=[[1.0, None], [3.0, None], [5.0, None], [6.0, None], [2.0, None], [2.0, None]],
        broken=[3],
        asked_before=0.0,
        asked=0.5,
    )
    found = advance(begin(8), state, settings=RacingConfig(keep=0.5), antithetic=False)
    assert found.racing == [0, 1, 4, 5]
    assert found.rewards == [1.0, None, 3.0, None, 5.0, 6.0, 2.0, 2.0]
    assert found.squared_error is None, "one problem tells nothing of what others would"
    limited = advance(begin(8), state, settings=RacingConfig(keep=0.5, tolerance=0.5), antithetic=False)
    assert limited.racing == [0, 1, 2, 4, 5, 6, 7]
    pairs = advance(begin(8), state, settings=RacingConfig(keep=0.1), antithetic=True)
    assert pairs.racing == [0, 1, 2, 4, 5, 6, 7], "two pairs can be compared, and two go on at least"
