"""Sudoku of 4x4: every row, column and 2x2 box holds 1, 2, 3 and 4.

A row is ``{"puzzle": [[1, 0, 0, 4], ...]}`` with 0 for an empty cell. The answer is the whole grid between
answer tags. Three components: ``solved``, ``units`` (the share of rows, columns and boxes that are right,
which tells bad answers apart) and ``format``.
"""

from collections.abc import Callable, Sequence
from itertools import product
from random import Random
from typing import Any

from shardes.tasks.answers import is_think_answer
from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.drawing import draw_distinct
from shardes.tasks.grids import Grid, answered_grid, grid_text, is_grid
from shardes.tasks.rows import column, wrong

_DIGITS = {1, 2, 3, 4}
_SIDE = range(4)
_CELLS = list(product(_SIDE, _SIDE))
_UNITS = (
    [[(line, place) for place in _SIDE] for line in _SIDE]
    + [[(line, place) for line in _SIDE] for place in _SIDE]
    + [
        [(top + line, left + place) for line in (0, 1) for place in (0, 1)]
        for top in (0, 2)
        for left in (0, 2)
    ]
)
_MAX_FRUITLESS_ATTEMPTS = 2000


def solved_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], *, puzzle: Sequence[Grid], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for a right grid that keeps the given cells, else 0.0."""
    shares = units_reward(prompts, completions, puzzle=puzzle)
    return [float(share == 1) for share in shares]


def units_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], *, puzzle: Sequence[Grid], **columns: Sequence[Any]
) -> list[float]:
    """Return the share of the 12 rows, columns and boxes that hold 1 to 4; 0.0 if a given cell changed."""
    return [_share(*args) for args in zip(completions, puzzle, strict=True)]


def format_reward(
    prompts: Sequence[Prompt], completions: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """Return 1.0 for a pair of think tags and a pair of answer tags with a 4x4 grid in it, else 0.0."""
    return [float(is_think_answer(text) and _answer(text) is not None) for text in completions]


def make_prompt(row: Row) -> Prompt:
    """Show the puzzle and ask for the whole grid."""
    system = (
        "You solve puzzles. Reason between <think> and </think>, then write the finished grid between "
        "<answer> and </answer>, and nothing after it."
    )
    user = (
        "Replace every 0 of this 4x4 Sudoku such that each row, each column and each of the four 2x2 boxes "
        "contains 1, 2, 3 and 4. The other cells stay as they are. Write the grid as four lines of four "
        f"digits with spaces between them.\n\n{grid_text(row['puzzle'])}"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def check_row(row: Row, where: str) -> None:
    """Refuse a row that is no 4x4 Sudoku, or one without a solution.

    Raises:
        UserError: Naming the place and the column.
    """
    wanted = "four lists of four digits from 0 (empty) to 4, e.g. [[1, 0, 0, 4], [0, 0, 1, 0], ...]"
    puzzle = column(row, "puzzle", where, wanted=wanted)
    if not is_grid(puzzle) or len(puzzle) != 4 or len(puzzle[0]) != 4 or max(map(max, puzzle)) > 4:
        raise wrong("puzzle", puzzle, where, wanted=wanted)
    if _num_solutions(puzzle, at_most=1) == 0:
        raise wrong("puzzle", puzzle, where, wanted="a puzzle that has a solution")


def _answer(response: str) -> Grid | None:
    grid = answered_grid(response)
    return grid if grid is not None and len(grid) == 4 and len(grid[0]) == 4 else None


def _share(response: str, puzzle: Grid) -> float:
    grid = _answer(response)
    if grid is None or any(puzzle[i][j] not in (0, grid[i][j]) for i, j in _CELLS):
        return 0.0
    return sum({grid[i][j] for i, j in unit} == _DIGITS for unit in _UNITS) / len(_UNITS)


def generate_puzzles(
    num_puzzles: int, *, seed: int, num_empty: Sequence[int] = (4, 5, 6, 7, 8, 9, 10)
) -> list[dict[str, Any]]:
    """Draw distinct puzzles, each with exactly one solution; a pure function of the arguments.

    Args:
        num_puzzles: Number of puzzles.
        seed: Seed of the draws.
        num_empty: Numbers of empty cells; each entry is drawn equally often. Fewer are emptied where a
            puzzle would get a second solution.

    Returns:
        Rows ``{"puzzle": grid, "solution": grid}``.

    Raises:
        UserError: If so many distinct puzzles are not found.
    """
    random = Random(seed).random

    def draw() -> dict[str, Any]:
        solution: Grid = [[0] * 4 for _ in _SIDE]
        _fill(solution, _shuffled(_CELLS, random), random)
        puzzle = [list(line) for line in solution]
        left = num_empty[int(random() * len(num_empty))]
        for i, j in _shuffled(_CELLS, random):
            if left == 0:
                break
            puzzle[i][j] = 0
            if _num_solutions(puzzle, at_most=2) == 1:
                left -= 1
            else:
                puzzle[i][j] = solution[i][j]
        return {"puzzle": puzzle, "solution": solution}

    return draw_distinct(
        num_puzzles, draw, key=puzzle_key, what="puzzles", max_fruitless_attempts=_MAX_FRUITLESS_ATTEMPTS
    )


def puzzle_key(row: Row) -> str:
    """Return the grid as text, which identifies a puzzle."""
    return grid_text(row["puzzle"])


def _shuffled(items: Sequence[Any], random: Callable[[], float]) -> list[Any]:
    """Return items in random order; only ``Random.random`` keeps its values from one Python to the next."""
    rest = list(items)
    return [rest.pop(int(random() * len(rest))) for _ in items]


def _fill(grid: Grid, cells: Sequence[tuple[int, int]], random: Callable[[], float]) -> bool:
    """Fill the grid's cells in place at random by backtracking; return False if it cannot be done."""
    if not cells:
        return True
    (i, j), *rest = cells
    for digit in _shuffled(_candidates(grid, i, j), random):
        grid[i][j] = digit
        if _fill(grid, rest, random):
            return True
    grid[i][j] = 0
    return False


def _num_solutions(grid: Grid, *, at_most: int) -> int:
    """Count the ways to fill the empty cells, no further than ``at_most``."""
    empty = next(((i, j) for i, j in _CELLS if grid[i][j] == 0), None)
    if empty is None:
        return int(all({grid[i][j] for i, j in unit} == _DIGITS for unit in _UNITS))
    i, j = empty
    num = 0
    work = [list(line) for line in grid]
    for digit in _candidates(grid, i, j):
        work[i][j] = digit
        num += _num_solutions(work, at_most=at_most - num)
        if num >= at_most:
            break
    return num


def _candidates(grid: Grid, i: int, j: int) -> list[int]:
    """Return the digits that no other cell of the units of (i, j) holds."""
    taken = {grid[k][m] for unit in _UNITS if (i, j) in unit for k, m in unit if (k, m) != (i, j)}
    return sorted(_DIGITS - taken)


TASK = TaskDefinition(
    "sudoku",
    make_prompt,
    check_row,
    rewards=(
        Component("solved", solved_reward),
        Component("units", units_reward, weight=0.5),
        Component("format", format_reward, weight=0.1),
    ),
    row_key=puzzle_key,
    generate=generate_puzzles,
)
TASKS = (TASK,)
REWARDS = {"sudoku.solved": solved_reward, "sudoku.units": units_reward, "sudoku.format": format_reward}
