from itertools import permutations, product

import pytest

from shardes.environments.builtin.sudoku import Sudoku, can_be_completed, make_board

CELLS = list(product(range(4), range(4)))


def is_right(grid):
    """By the rules, cell by cell."""
    boxes = [[grid[i + a][j + b] for a in (0, 1) for b in (0, 1)] for i in (0, 2) for j in (0, 2)]
    return all(sorted(unit) == [1, 2, 3, 4] for unit in [*grid, *zip(*grid, strict=True), *boxes])


LINES = list(permutations((1, 2, 3, 4)))
# Two lines can be the upper or the lower half of a grid if no column has a digit twice.
HALVES = [(a, b) for a, b in product(LINES, LINES) if all(x != y for x, y in zip(a, b, strict=True))]
ALL_GRIDS = [grid for a, b in product(HALVES, HALVES) if is_right(grid := (*a, *b))]


def completions(board):
    return [g for g in ALL_GRIDS if all(board[i][j] in (0, g[i][j]) for i, j in CELLS)]


def test_boards_are_functions_of_their_index_and_have_a_completion():
    assert make_board(0, empty=(4, 12)) == [[0, 0, 3, 1], [0, 1, 0, 0], [0, 0, 1, 3], [1, 0, 4, 0]]
    assert make_board(1, empty=(4, 12)) == [[4, 1, 2, 3], [0, 3, 1, 4], [0, 0, 0, 1], [1, 4, 0, 2]]
    assert len(ALL_GRIDS) == 288
    numbers = set()
    for index in range(100):
        board = make_board(index, empty=(4, 15))
        numbers.add(sum(line.count(0) for line in board))
        assert completions(board)
    assert numbers == set(range(4, 16))


def test_the_rows_of_the_configuration_have_different_boards():
    boards = [str(make_board(index, empty=(4, 12))) for index in range(1000)]
    assert not set(boards[:800]) & set(boards[800:])


def test_a_board_can_be_completed_if_brute_force_says_so():
    for index in range(60):
        board = make_board(index, empty=(8, 15))
        for (i, j), digit in product(CELLS[:6], range(1, 5)):
            changed = [list(line) for line in board]
            changed[i][j] = digit
            assert can_be_completed(changed) == bool(completions(changed))


@pytest.mark.parametrize("reward", ["solved", "share"])
def test_right_moves_fill_the_board(reward):
    for index in range(20):
        environment = Sudoku(empty=(4, 15), reward=reward)
        environment.reset(index=index)
        board = make_board(index, empty=(4, 15))
        solution = completions(board)[-1]
        empty = [(i, j) for i, j in CELLS if board[i][j] == 0]
        outcomes = [environment.step(f"I say {i + 1}, {j + 1}, {solution[i][j]}") for i, j in empty]
        assert [is_done for _, _, is_done in outcomes] == [False] * (len(empty) - 1) + [True]
        rewards = [reward for _, reward, _ in outcomes]
        assert sum(rewards) == pytest.approx(1)
        last = {"solved": [*[0.0] * (len(empty) - 1), 1.0], "share": [1 / len(empty)] * len(empty)}
        assert rewards == last[reward]
        assert environment.numbers == {"success": 1.0, "right_moves": len(empty), "wrong_moves": 0.0}


def test_the_model_sees_the_board_after_each_move():
    environment = Sudoku()
    assert environment.reset(index=1).endswith("\n\n4 1 2 3\n0 3 1 4\n0 0 0 1\n1 4 0 2")
    after = "Right. The board is now:\n\n4 1 2 3\n2 3 1 4\n0 0 0 1\n1 4 0 2"
    assert environment.step("Not 2 1 3 but 2 1 2") == (after, 0.0, False)


WRONG = {
    "2 1 3": "A 3 in row 2 and column 1 is wrong.",
    "1 1 4": "The cell in row 1 and column 1 is not empty.",
    "2 1 5": "There is no move in what you wrote.",
    "12 1 2": "There is no move in what you wrote.",
    "": "There is no move in what you wrote.",
}


@pytest.mark.parametrize("move", WRONG)
def test_a_wrong_move_ends_the_episode_or_costs(move):
    environment = Sudoku()
    environment.reset(index=1)
    assert environment.step(move) == ("", 0.0, True)
    environment = Sudoku(wrong_move_cost=0.25)
    environment.reset(index=1)
    board = "4 1 2 3\n0 3 1 4\n0 0 0 1\n1 4 0 2"
    assert environment.step(move) == (f"{WRONG[move]} The board is now:\n\n{board}", -0.25, False)
    assert environment.numbers == {"success": 0.0, "right_moves": 0.0, "wrong_moves": 1.0}


def test_wrong_moves_use_up_the_turns_and_none_is_over_without_success():
    environment = Sudoku(empty=(4, 5), turns=5, wrong_move_cost=0.0, reward="share")
    environment.reset(index=3)
    outcomes = [environment.step("nothing") for _ in range(5)]
    assert [is_done for *_, is_done in outcomes] == [False] * 4 + [True]
    assert sum(reward for _, reward, _ in outcomes) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"empty": [0, 4]}, "empty must be a least and a largest number from 1 to 15"),
        ({"empty": [4, 16]}, "empty must be a least and a largest number from 1 to 15"),
        ({"turns": 11}, "turns must be at least 12"),
        ({"reward": "cells"}, "reward must be solved or share; got 'cells'"),
        ({"wrong_move_cost": -1}, "wrong_move_cost must be at least 0"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sudoku(**arguments)
