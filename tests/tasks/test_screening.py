"""Which of the drawn problems are asked, what is learned of them, and what weights do."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.config.task import ScreeningConfig
from shardes.errors import UserError
from shardes.es.objective import judge
from shardes.noise import Draw, data_order
from shardes.tasks.screening import AskedProblems, Screening, make_screening


def screening_of(*, seed=0, numbers=None, **keys):
    return Screening(ScreeningConfig(**keys), seed=seed, numbers=numbers)


def learn(screening, rows, *layout):
    """Has members earn ``layout``, one row for each, on problems of these rows."""
    return screening.learn(AskedProblems(rows), [dict(enumerate(row)) for row in layout])


def screened(screening, rows):
    """The rows that are screened, by asking until each one has been left out."""
    asked = [screening.choose(rows, iteration=iteration).rows for iteration in range(200)]
    return {row for each in asked for row in rows if row not in each}


def test_nothing_is_screened_before_anything_is_known():
    assert screening_of().choose([4, 2, 7], iteration=0) == AskedProblems([4, 2, 7])


def test_what_the_journal_has_of_an_iteration():
    screening = screening_of()
    # Problems 0 to 4: all earn 1; they differ; all earn 0; only one member has it; nobody's answer counts.
    layout = [1.0, 0.5, 0.0, 0.3, None], [1.0, 0.75, 0.0, None, None], [1.0, 0.5, None, None, None]
    record = learn(screening, [14, 12, 10, 17, 11], *layout)
    assert record == {
        "num_problems": 5,
        "num_left_out": 0,
        "informative": [12],
        "agreed": [[1.0, [14]], [0.0, [10]]],
    }
    assert screened(screening, [14, 12, 10, 17, 11]) == {14, 10}


def test_problems_are_screened_after_some_times_in_a_row_with_one_reward():
    rows, screening = [5, 6, 7], screening_of(patience=3)

    def learned(first, second):
        learn(screening, rows, [first] * 3, [second] * 3)
        return screened(screening, rows)

    assert [learned(1.0, 1.0), learned(1.0, 1.0), learned(0.0, 1.0)] == [set()] * 3
    assert [learned(1.0, 1.0), learned(1.0, 1.0)] == [set()] * 2, "the row began again"
    assert [learned(0.0, 0.0), learned(0.0, 0.0)] == [set()] * 2, "with another reward, too"
    assert learned(0.0, 0.0) == {*rows}
    assert learned(0.0, None) == {*rows}, "there was nothing to compare"
    assert learned(0.0, 1.0) == set()


@settings(deadline=None, max_examples=50)
@given(
    num_screened=st.integers(0, 12),
    num_others=st.integers(0, 6),
    keep=st.sampled_from([0.01, 0.1, 0.25, 0.7]),
    iteration=st.integers(0, 1000),
    is_weighted=st.booleans(),
)
def test_how_many_are_asked_and_what_they_weigh(num_screened, num_others, keep, iteration, is_weighted):
    screening = screening_of(keep_fraction=keep, importance_weights=is_weighted)
    agreed, others = list(range(num_screened)), list(range(100, 100 + num_others))
    learn(screening, agreed, *[[0.5] * num_screened] * 3)
    drawn = sorted(agreed + others, key=lambda row: row * 37 % 101)
    found = screening.choose(drawn, iteration=iteration)
    hundredths = {0.01: 1, 0.1: 10, 0.25: 25, 0.7: 70}[keep]
    count = -(-num_screened * hundredths // 100)
    assert [row for row in drawn if row in found.rows] == list(found.rows), "the order stays"
    assert set(others) <= set(found.rows)
    assert len(found.rows) == num_others + count
    assert found.num_left_out == num_screened - count
    assert len(found.rows) > 0 or not drawn
    if is_weighted and num_screened:
        assert math.fsum(found.weights) == pytest.approx(len(drawn))
        ones = [weight for row, weight in zip(found.rows, found.weights, strict=True) if row in others]
        assert ones == [1.0] * num_others
    else:
        assert found.weights is None


def test_weights_make_members_rewards_unbiased_and_without_them_they_are_not():
    """Over all choices, each equally likely, a member's mean reward is that over the drawn problems."""
    drawn, agreed, count = [3, 8, 1, 9, 4, 6], [8, 9, 4, 6], 2
    rewards = {3: 0.1, 8: 0.9, 1: 0.4, 9: 0.2, 4: 0.6, 6: 0.7}
    whole = sum(rewards.values()) / len(drawn)
    for is_weighted in (True, False):
        screening = screening_of(keep_fraction=0.5, importance_weights=is_weighted)
        learn(screening, agreed, [0.5] * 4, [0.5] * 4)
        found = {}
        for iteration in range(300):
            asked = screening.choose(drawn, iteration=iteration)
            kept = frozenset(asked.rows) & set(agreed)
            values = [rewards[row] for row in asked.rows]
            no_failures = [False] * len(values)
            found[kept] = judge(values, no_failures, samples_per_prompt=1, weights=asked.weights).reward
        assert set(found) == {frozenset(each) for each in itertools.combinations(agreed, count)}
        mean = math.fsum(found.values()) / len(found)
        assert (mean == pytest.approx(whole, rel=1e-12)) == is_weighted


def test_each_screened_problem_is_asked_equally_often_and_whatever_was_drawn():
    screening = screening_of(keep_fraction=0.25)
    learn(screening, range(8), [0.0] * 8, [0.0] * 8)
    asked = [screening.choose(range(8), iteration=iteration).rows for iteration in range(1000)]
    counts = [sum(row in each for each in asked) for row in range(8)]
    assert sum(counts) == 2000
    assert max(abs(count - 250) for count in counts) < 60  # 4 standard deviations; the draws are fixed
    # With random numbers of their own: those of the problems' draw would favour the same rows.
    wanted = [data_order(8, seed=0, iteration=i, count=2, draw=Draw.SCREENED).tolist() for i in range(1000)]
    assert asked == [sorted(rows) for rows in wanted]
    assert data_order(10, seed=1, iteration=2, count=5, draw=Draw.SCREENED).tolist() == [7, 9, 6, 2, 0]


def test_a_resumed_run_knows_what_the_journal_knows():
    first, records = screening_of(patience=2), []
    for iteration in range(12):
        asked = first.choose([row for row in range(9) if (row + iteration) % 4], iteration=iteration)
        layout = [{p: float(row * (iteration // 5) % 3) for p, row in enumerate(asked.rows)}] * 2
        layout = [layout[0], {p: value + (p == iteration % 5) for p, value in layout[1].items()}]
        records.append({"screening": json.loads(json.dumps(first.learn(asked, layout)))})
    assert sum(record["screening"]["num_left_out"] for record in records) > 5
    second = screening_of(patience=2)
    second.resume(records)
    for iteration in range(12, 30):
        assert second.choose(range(9), iteration=iteration) == first.choose(range(9), iteration=iteration)
    with pytest.raises(UserError, match="update of iteration 1 does not say what task"):
        second.resume([records[0], {"iteration": 1}])


def test_rows_keep_their_numbers_when_others_are_left_out():
    rows = [{"n": n} for n in range(6)]
    settings = ScreeningConfig()
    whole = make_screening(settings, SimpleNamespace(train=rows, all_train=None), seed=0)
    record = learn(whole, [0, 1, 2, 3, 4, 5], [0.0, 0.5, 1.0, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    fewer = SimpleNamespace(train=[rows[1], rows[2], rows[4]], all_train=rows)
    screening = make_screening(settings, fewer, seed=0)
    screening.resume([{"screening": record}])
    assert screened(screening, [0, 1, 2]) == {1, 2}
    assert make_screening(None, fewer, seed=0) is None
