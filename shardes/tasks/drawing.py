"""Random problems, drawn until there are enough different ones."""

from collections.abc import Callable
from typing import Any

from shardes.errors import UserError


def draw_distinct(
    num_problems: int,
    draw: Callable[[], dict[str, Any] | None],
    *,
    key: Callable[[dict[str, Any]], str],
    what: str,
    remedy: str = "ask for fewer",
    max_fruitless_attempts: int = 20_000,
) -> list[dict[str, Any]]:
    """Draw rows with different keys, in the order in which they were first drawn.

    Args:
        num_problems: Number of rows.
        draw: Makes a row; None: this attempt failed.
        key: Names a row's problem.
        what: Description of what is drawn, with its limits, for the message.
        remedy: Advice if there are too few, for the message.
        max_fruitless_attempts: Give up after so many attempts in a row that brought nothing new.

    Raises:
        UserError: If so many are not found.
    """
    rows: dict[str, dict[str, Any]] = {}
    attempts_left = max_fruitless_attempts
    while len(rows) < num_problems:
        attempts_left -= 1
        if attempts_left < 0:
            raise UserError(f"found only {len(rows)} distinct {what}; wanted: {num_problems}; {remedy}")
        row = draw()
        if row is not None and rows.setdefault(key(row), row) is row:
            attempts_left = max_fruitless_attempts
    return list(rows.values())
