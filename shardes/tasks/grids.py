"""Grids of digits, as rows give them and as a model writes them."""

import json
import re
from typing import Any

from shardes.tasks.answers import last_answer

Grid = list[list[int]]

_MAX_CHARACTERS = 4000
# One line of a grid: digits, with spaces, commas or bars between them, perhaps in brackets.
_LINE = re.compile(r"[\[(|,\s]*[0-9](?:[\s,|]*[0-9])*[\])|,\s]*")


def is_grid(value: Any, *, max_side: int = 30) -> bool:
    """Return True for a list of equally long rows of digits, each side from 1 to ``max_side``."""
    return (
        isinstance(value, list)
        and 1 <= len(value) <= max_side
        and all(isinstance(line, list) and 1 <= len(line) <= max_side for line in value)
        and len({len(line) for line in value}) == 1
        and all(type(cell) is int and 0 <= cell <= 9 for line in value for cell in line)
    )


def grid_text(grid: Grid) -> str:
    """Format a grid as a prompt shows it: one line a row, spaces between the digits."""
    return "\n".join(" ".join(map(str, line)) for line in grid)


def answered_grid(response: str) -> Grid | None:
    """Parse the grid in the last ``<answer>`` pair of a response.

    One line a row, each cell one digit, with spaces, commas, bars or nothing between them; rows may be in
    brackets. Or all rows as a list of lists in JSON. Anything else in between makes it no grid: nothing is
    guessed.

    Returns:
        The grid; None if there is no pair or no grid in it, or rows differ in length.
    """
    answer = last_answer(response)
    if answer is None or len(answer) > _MAX_CHARACTERS:
        return None
    if answer.lstrip().startswith("[["):
        try:
            listed = json.loads(answer)
        except (ValueError, RecursionError):
            return None
        return listed if is_grid(listed) else None
    lines = [line for line in answer.splitlines() if line.strip(" \t[](),")]
    if not lines or not all(map(_LINE.fullmatch, lines)):
        return None
    grid = [[int(digit) for digit in re.findall("[0-9]", line)] for line in lines]
    return grid if is_grid(grid) else None
