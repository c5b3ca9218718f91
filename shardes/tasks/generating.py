"""Problems that can be made, and those that are converted from a data set's own format."""

import json
from pathlib import Path
from typing import Any, Protocol

from shardes.errors import UserError
from shardes.tasks import arc, arithmetic, countdown, sudoku
from shardes.tasks.base import TaskDefinition
from shardes.tasks.data import read_rows


class Generator(Protocol):
    """Makes distinct problems: a pure function of its arguments."""

    def __call__(self, num_problems: int, /, *, seed: int) -> list[dict[str, Any]]:
        """Rows of so many problems."""


_GENERATORS: dict[str, tuple[TaskDefinition, Generator]] = {
    "arithmetic": (arithmetic.TASK, arithmetic.generate_problems),
    "countdown": (countdown.CHAT, countdown.generate_problems),
    "sudoku": (sudoku.TASK, sudoku.generate_puzzles),
}


def make_problems(task: str, num_problems: int, *, seed: int, exclude: Path | None) -> list[dict[str, Any]]:
    """Problems of a task, without those of a file.

    Args:
        task: ``arithmetic``, ``countdown`` or ``sudoku``.
        num_problems: How many.
        seed: Seed of the draws.
        exclude: A file of the task's rows, none of which is drawn.

    Raises:
        UserError: The file cannot be used, or there are not so many problems.
    """
    definition, generate = _GENERATORS[task]
    assert definition.row_key is not None
    known = [] if exclude is None else read_rows(exclude, key="--exclude", check=definition.check_row)
    excluded = {definition.row_key(row) for row in known}
    candidates = generate(num_problems + len(excluded), seed=seed)
    return [row for row in candidates if definition.row_key(row) not in excluded][:num_problems]


def convert_arc(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory of ARC puzzles, one file each.

    Raises:
        UserError: There is no such directory, it has no puzzles, or one of them cannot be used.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise UserError(f"--source: {directory} has no *.json files; give a directory of ARC puzzles")
    rows = []
    for path in paths:
        try:
            puzzle = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--source: {path} cannot be read as JSON ({error})") from None
        rows += arc.rows_of_puzzle(puzzle, name=str(path))
    return rows
