"""ARC-style puzzles (Chollet 2019): find the rule that turns the examples' inputs into their outputs.

A row is ``{"examples": [{"input": grid, "output": grid}, ...], "input": grid, "output": grid}``, grids being
lists of rows of digits. Components: ``solved``, ``cells`` (the share of right cells, if the answer has the
right size) and ``format``.
"""

from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.tasks.answers import is_think_answer
from shardes.tasks.base import Component, Prompt, Row, TaskDefinition
from shardes.tasks.grids import Grid, answered_grid, grid_text, is_grid
from shardes.tasks.judging import per_completion
from shardes.tasks.rows import column, wrong
from shardes.utils.reading import parse_json, read_regular

_MOST_BYTES = 1 << 24


@per_completion
def solved_reward(text: str, /, *, output: Grid) -> bool:
    """Return 1.0 for exactly the output's grid, else 0.0."""
    return answered_grid(text) == output


@per_completion
def cells_reward(text: str, /, *, output: Grid) -> float:
    """Return the share of the output's cells that are right; 0.0 for a grid of another size or none."""
    grid = answered_grid(text)
    if grid is None or [len(line) for line in grid] != [len(line) for line in output]:
        return 0.0
    cells = [
        a == b for line, other in zip(grid, output, strict=True) for a, b in zip(line, other, strict=True)
    ]
    return sum(cells) / len(cells)


@per_completion
def format_reward(text: str, /) -> bool:
    """Return 1.0 for a pair of think tags and a pair of answer tags with a grid in it, else 0.0."""
    return is_think_answer(text) and answered_grid(text) is not None


def make_prompt(row: Row) -> Prompt:
    """Show the examples and the input, and ask for the output's grid."""
    system = (
        "You find the rule behind grids of digits, each digit a colour. Reason between <think> and </think>, "
        "then write the output grid between <answer> and </answer>, and nothing after it."
    )
    parts = ["One rule turns each of these inputs into its output."]
    for number, example in enumerate(row["examples"], start=1):
        parts += [f"Input {number}:\n{grid_text(example['input'])}"]
        parts += [f"Output {number}:\n{grid_text(example['output'])}"]
    parts += [f"Apply the rule to this input:\n{grid_text(row['input'])}"]
    parts += ["Write one line for each row of the output, with spaces between the digits."]
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(parts)}]


def check_row(row: Row, where: str) -> None:
    """Refuse a row that is no puzzle of this kind.

    Raises:
        UserError: Naming the place and the column.
    """
    wanted = "a list of equally long rows of digits, at most 30x30, e.g. [[0, 1], [2, 0]]"
    for name in ("input", "output"):
        grid = column(row, name, where, wanted=wanted)
        if not is_grid(grid):
            raise wrong(name, grid, where, wanted=wanted)
    wanted = 'a list of one or more examples, each {"input": grid, "output": grid}'
    examples = column(row, "examples", where, wanted=wanted)
    if not isinstance(examples, list) or not examples:
        raise wrong("examples", examples, where, wanted=wanted)
    for example in examples:
        if not isinstance(example, dict) or not all(is_grid(example.get(key)) for key in ("input", "output")):
            raise wrong("examples", example, where, wanted=f"in each place: {wanted}")


def rows_of_puzzle(puzzle: Any, *, name: str) -> list[dict[str, Any]]:
    """Return the rows of one puzzle in the format of the ARC data sets: one row for each of its tests.

    Args:
        puzzle: ``{"train": [pairs], "test": [pairs]}``, a pair being ``{"input": grid, "output": grid}``.
        name: Names the rows: their ``id`` is this and the test's number.

    Raises:
        UserError: It has another form.
    """
    if not isinstance(puzzle, dict) or not all(
        isinstance(puzzle.get(key), list) for key in ("train", "test")
    ):
        raise UserError(f'{name}: not a puzzle of the form {{"train": [...], "test": [...]}}')
    rows = []
    for number, test in enumerate(puzzle["test"]):
        pair = test if isinstance(test, dict) else {}
        row = {"id": f"{Path(name).stem}/{number}", "examples": puzzle["train"], **pair}
        check_row(row, f"{name} test {number}")
        rows.append(row)
    return rows


def rows_of_directory(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a directory of ARC puzzles, one ``*.json`` file each, in the order of their names.

    Raises:
        UserError: There is no such directory, it has no puzzles, or one of them cannot be used.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise UserError(f"--source: {directory} has no *.json files; give a directory of ARC puzzles")
    rows = []
    for path in paths:
        try:
            puzzle = parse_json(read_regular(path, max_bytes=_MOST_BYTES).decode())
        except (OSError, ValueError) as error:
            raise UserError(f"--source: {path} cannot be read as JSON ({error})") from None
        rows += rows_of_puzzle(puzzle, name=str(path))
    return rows


TASK = TaskDefinition(
    "arc",
    make_prompt,
    check_row,
    rewards=(
        Component("solved", solved_reward),
        Component("cells", cells_reward, weight=0.5),
        Component("format", format_reward, weight=0.1),
    ),
    convert=rows_of_directory,
)
TASKS = (TASK,)
REWARDS = {"arc.solved": solved_reward, "arc.cells": cells_reward, "arc.format": format_reward}
