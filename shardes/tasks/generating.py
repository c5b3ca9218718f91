"""Problems made by a task, or converted from a data set's own format."""

from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.tasks.data import read_rows
from shardes.tasks.registry import TASKS

MAKEABLE = [name for name, task in TASKS.items() if task.generate or task.convert]
"""Names of the tasks that ``make_problems`` has problems for."""


def make_problems(
    task: str, num_problems: int, *, seed: int, exclude: Path | None, source: Path | None
) -> list[dict[str, Any]]:
    """Make problems of a task, without those of a file; or convert all of a data set.

    Args:
        task: One of ``MAKEABLE``.
        num_problems: The number of problems to make; a conversion takes all.
        seed: Seed of the draws.
        exclude: A file of the task's rows, none of which is made.
        source: The directory to convert, for a task that is converted; None for one whose problems are made.

    Raises:
        UserError: A file cannot be used, there are not so many problems, or the task needs a source or takes
            none.
    """
    definition = TASKS[task]
    if source is not None and definition.convert is not None:
        return definition.convert(source)
    if source is not None or definition.generate is None:
        convertible = ", ".join(name for name, known in TASKS.items() if known.convert)
        raise UserError(
            f"--source: give the directory of a data set for {convertible}, and for no other task; "
            f"got the task {task}"
        )
    assert definition.row_key is not None, "made problems are told apart by their keys"
    known = [] if exclude is None else read_rows(exclude, key="--exclude", check=definition.check_row)
    excluded = {definition.row_key(row) for row in known}
    candidates = definition.generate(num_problems + len(excluded), seed=seed)
    return [row for row in candidates if definition.row_key(row) not in excluded][:num_problems]
