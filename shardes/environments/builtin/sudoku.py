"""Sudoku of 4x4 in turns: the model fills one cell a turn, until the board is full.

A row is ``{"index": i}``; its board is a function of the index alone. A move is right if the board can be
completed after it, so a board with many empty cells may be completed in several ways.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Literal

from shardes.tasks.grids import Grid, grid_text

_MOVE = re.compile(r"(?<![0-9])([1-4])[ ,]+([1-4])[ ,]+([1-4])(?![0-9])")
_CELLS = list(product(range(4), range(4)))
_MAX_EMPTY = 15


def make_board(index: int, *, empty: Sequence[int]) -> Grid:
    """Return the board of an index, 4x4 with 0 for an empty cell.

    Args:
        index: Index of the row, from 0.
        empty: Least and largest number of empty cells; each number between them is drawn equally often.
    """
    grids = _grids()
    which, count = (_draw(index, name) for name in ("grid", "count"))
    board = [list(line) for line in grids[which % len(grids)]]
    order = sorted(_CELLS, key=lambda cell: _draw(index, f"cell {cell}"))
    for i, j in order[: empty[0] + count % (empty[1] - empty[0] + 1)]:
        board[i][j] = 0
    return board


def can_be_completed(board: Grid) -> bool:
    """Return True if some full board with 1 to 4 in every row, column and box has the board's digits."""
    return any(all(board[i][j] in (0, grid[i][j]) for i, j in _CELLS) for grid in _grids())


@cache
def _grids() -> list[tuple[tuple[int, ...], ...]]:
    """Return all 288 full boards."""
    lines = list(permutations((1, 2, 3, 4)))

    def differ(a: Sequence[int], b: Sequence[int]) -> bool:
        return all(x != y for x, y in zip(a, b, strict=True))

    def form_boxes(a: Sequence[int], b: Sequence[int]) -> bool:
        return len({*a[:2], *b[:2]}) == 4 and len({*a[2:], *b[2:]}) == 4

    halves = [(a, b) for a in lines for b in lines if form_boxes(a, b)]
    return [
        (*top, *bottom)
        for top in halves
        for bottom in halves
        if all(differ(a, b) for a in top for b in bottom)
    ]


def _draw(index: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{name} {index}".encode()).digest()[:8])


class Sudoku:
    """Environment of one board.

    Args:
        empty: Least and largest number of empty cells, from 1 to 15.
        turns: Moves allowed, right and wrong ones.
        wrong_move_cost: Reward that a wrong move costs; the board then stays as it is. None: a wrong move
            ends the episode.
        reward: ``solved``: 1 for the move that completes the board, and 0 for others. ``share``: for each
            right move its share of the cells that were empty; they sum to 1 for a completed board.

    Raises:
        ValueError: An argument is none of these.
    """

    def __init__(
        self,
        empty: Sequence[int] = (4, 12),
        turns: int = 15,
        wrong_move_cost: float | None = None,
        reward: Literal["solved", "share"] = "solved",
    ) -> None:
        if not (len(empty) == 2 and 1 <= empty[0] <= empty[1] <= _MAX_EMPTY):
            raise ValueError(f"empty must be a least and a largest number from 1 to 15; got {list(empty)}")
        if turns < empty[1]:
            raise ValueError(
                f"turns must be at least {empty[1]}, the largest number of empty cells; got {turns}"
            )
        if reward not in ("solved", "share"):
            raise ValueError(f"reward must be solved or share; got {reward!r}")
        if wrong_move_cost is not None and wrong_move_cost < 0:
            raise ValueError(f"wrong_move_cost must be at least 0; got {wrong_move_cost}")
        self._empty, self._turns, self._cost, self._reward = empty, turns, wrong_move_cost, reward
        self.numbers = {"success": 0.0, "right_moves": 0.0, "wrong_moves": 0.0}

    def reset(self, index: int) -> str:
        """Show the board, and say how cells are filled."""
        self._board = make_board(index, empty=self._empty)
        self._num_empty = sum(line.count(0) for line in self._board)
        penalty = "ends the game" if self._cost is None else "leaves the board as it is"
        return (
            "Fill this 4x4 Sudoku such that each row, each column and each of the four 2x2 boxes contains "
            "1, 2, 3 and 4. A 0 is an empty cell. Fill one cell a turn: write its row and its column, both "
            "from 1 at the top left, and then the digit. For example, 2 3 4 writes a 4 into the third cell "
            "of the second row. The last three such digits that you write are your move. A wrong move "
            f"{penalty}.\n\n"
            f"{grid_text(self._board)}"
        )

    def step(self, completion: str) -> tuple[str, float, bool]:
        """Make the last move of the completion."""
        mistake = self._mistake(_MOVE.findall(completion))
        self.numbers["wrong_moves" if mistake else "right_moves"] += 1
        is_full = self.numbers["right_moves"] == self._num_empty
        self.numbers["success"] = float(is_full)
        num_moves = self.numbers["right_moves"] + self.numbers["wrong_moves"]
        if mistake:
            reward = -(self._cost or 0.0)
        else:
            reward = float(is_full) if self._reward == "solved" else 1 / self._num_empty
        is_done = is_full or num_moves == self._turns or (mistake is not None and self._cost is None)
        if is_done:
            return "", reward, True
        return f"{mistake or 'Right.'} The board is now:\n\n{grid_text(self._board)}", reward, False

    def _mistake(self, moves: list[tuple[str, str, str]]) -> str | None:
        """Make a move if it is right; return what is wrong with it, or None."""
        if not moves:
            return "There is no move in what you wrote."
        row, column, digit = map(int, moves[-1])
        if self._board[row - 1][column - 1]:
            return f"The cell in row {row} and column {column} is not empty."
        self._board[row - 1][column - 1] = digit
        if can_be_completed(self._board):
            return None
        self._board[row - 1][column - 1] = 0
        return f"A {digit} in row {row} and column {column} is wrong."
