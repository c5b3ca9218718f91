import pytest

from shardes.environments.builtin.guess_number import GuessNumber, make_puzzle, num_ranges

SHORT = {"numbers": [10, 99], "sizes": [16, 32]}


def bisect(environment, index):
    """Play an episode by bisecting; return the guesses, the rewards and whether it came to its end."""
    low, high = map(int, environment.reset(index=index).split("-"))
    guesses, rewards, is_done = [], [], False
    while not is_done:
        guesses.append((low + high) // 2)
        answer, reward, is_done = environment.step(str(guesses[-1]))
        rewards.append(reward)
        if answer == "higher":
            low = guesses[-1] + 1
        elif answer == "lower":
            high = guesses[-1] - 1
    return guesses, rewards


def test_the_puzzles_of_indices_do_not_change():
    puzzles = [make_puzzle(index, **SHORT) for index in (0, 1, 1139)]
    assert [(puzzle.low, puzzle.high, puzzle.secret) for puzzle in puzzles] == [
        (46, 74, 69),
        (20, 48, 40),
        (46, 74, 48),
    ]


def test_each_range_comes_once_before_any_comes_again():
    count = num_ranges(**SHORT)
    assert count == sum(90 - size + 1 for size in range(16, 33))
    puzzles = [make_puzzle(index, **SHORT) for index in range(count)]
    ranges = {(puzzle.low, puzzle.high) for puzzle in puzzles}
    assert len(ranges) == count
    assert all(10 <= p.low <= p.secret <= p.high <= 99 and 15 <= p.high - p.low <= 31 for p in puzzles)
    again = make_puzzle(count, **SHORT)
    assert (again.low, again.high) == (puzzles[0].low, puzzles[0].high)
    # The numbers are spread over their ranges.
    places = [(puzzle.secret - puzzle.low) / (puzzle.high - puzzle.low) for puzzle in puzzles]
    assert sum(places) / count == pytest.approx(0.5, abs=0.03)


def test_bisecting_finds_every_number_in_the_fewest_guesses_with_the_reward_at_the_end():
    most = 0
    for index in range(num_ranges(**SHORT)):
        environment = GuessNumber(**SHORT, guesses=6, brief=True)
        guesses, rewards = bisect(environment, index)
        assert guesses[-1] == make_puzzle(index, **SHORT).secret
        assert rewards == [0.0] * (len(guesses) - 1) + [1.0]
        assert environment.numbers == {"success": 1.0, "unread": 0.0}
        most = max(most, len(guesses))
    assert most == 6  # 32 numbers


def test_one_guess_too_few_earns_nothing():
    index = next(i for i in range(300) if len(bisect(GuessNumber(**SHORT, brief=True), i)[0]) == 5)
    environment = GuessNumber(**SHORT, guesses=4, brief=True)
    assert bisect(environment, index)[1] == [0.0] * 4
    assert environment.numbers["success"] == 0.0


def test_the_last_number_is_the_guess_and_an_answer_without_one_takes_a_guess():
    environment = GuessNumber(guesses=4)
    first = environment.reset(index=5)
    secret = make_puzzle(5, numbers=(1, 100), sizes=(100, 100)).secret
    assert "from 1 to 100" in first and "at most 4 guesses" in first
    assert environment.step(f"Not {secret}, but {secret + 1}.") == ("lower. Guesses left: 3.", 0.0, False)
    assert environment.step("I do not know") == (
        "There is no number in what you wrote. Guesses left: 2.",
        0.0,
        False,
    )
    assert environment.step("-3") == ("higher. Guesses left: 1.", 0.0, False)
    assert environment.step(f"{secret}!") == ("", 1.0, True)
    assert environment.numbers == {"success": 1.0, "unread": 1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numbers": [9, 1]}, "numbers must be a least and a largest number"),
        ({"sizes": [1, 2, 3]}, "sizes must be a least and a largest number"),
        ({"sizes": [50, 101]}, "sizes must be from 1 to 100"),
        ({"guesses": 0}, "guesses must be at least 1"),
    ],
)
def test_arguments_without_a_puzzle_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GuessNumber(**arguments)
