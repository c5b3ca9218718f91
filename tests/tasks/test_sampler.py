"""Which problems an iteration asks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardes.noise import data_order
from shardes.tasks.sampler import draw_batch


def draws(num_problems, batch_size, sampling, *, seed=0, iterations=range(6)):
    return [
        draw_batch(num_problems, batch_size=batch_size, sampling=sampling, seed=seed, iteration=iteration)
        for iteration in iterations
    ]


@pytest.mark.parametrize("sampling", ["random", "epochs", "fixed"])
def test_all_problems_in_their_order_where_no_fewer_are_asked_for(sampling):
    assert draws(5, None, sampling) == draws(5, 5, sampling) == draws(5, 9, sampling) == [[0, 1, 2, 3, 4]] * 6


def test_random_draws_anew():
    drawn = draws(50, 7, "random")
    assert drawn == [data_order(50, seed=0, iteration=i, count=7).tolist() for i in range(6)]
    assert len({tuple(batch) for batch in drawn}) == 6
    assert all(len(set(batch)) == 7 for batch in drawn)


def test_fixed_draws_once():
    drawn = draws(50, 7, "fixed")
    assert drawn == [drawn[0]] * 6
    assert len(set(drawn[0])) == 7
    assert draws(50, 7, "fixed", seed=1) != drawn


@given(st.integers(2, 23), st.data())
def test_epochs_ask_every_problem_once_before_any_a_second_time(num_problems, data):
    batch_size = data.draw(st.integers(1, num_problems - 1))
    drawn = draws(num_problems, batch_size, "epochs", iterations=range(2 * num_problems))
    assert {len(batch) for batch in drawn} == {batch_size}
    sequence = [index for batch in drawn for index in batch]
    for first in range(0, len(sequence), num_problems):
        epoch = sequence[first : first + num_problems]
        assert set(Counter(epoch).values()) == {1}
    # Any iteration can be had without those before it.
    assert draws(num_problems, batch_size, "epochs", iterations=[3, 1]) == [drawn[3], drawn[1]]


def test_epochs_are_shuffled_anew():
    first, second, third = draws(40, 39, "epochs", iterations=range(3))
    assert first != sorted(first)
    assert first[:10] != (second + third)[1:11]
    assert draws(40, 39, "epochs", seed=1) != draws(40, 39, "epochs")
    assert draws(5, 2, "epochs") == [[3, 0], [2, 1], [4, 2], [1, 4], [3, 0], [2, 3]]
