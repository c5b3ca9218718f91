"""Checks of a task's rows: a mistake in the data is one message that names the line and the column."""

from collections.abc import Mapping
from typing import Any

from shardes.errors import UserError


def column(row: Mapping[str, Any], name: str, where: str, *, wanted: str) -> Any:
    """Return a row's value in a column.

    Args:
        row: The row.
        name: The column's name.
        where: Names the row in the message, e.g. ``task.data: data.jsonl line 7``.
        wanted: Description of what the column should hold, for the message.

    Raises:
        UserError: There is no such column.
    """
    if name not in row:
        raise UserError(
            f"{where}: column '{name}' is missing; the row has {', '.join(map(repr, row)) or 'no columns'}; "
            f"wanted: {wanted}. If another column holds it, give its name: task.columns={{{name}: COLUMN}}"
        )
    return row[name]


def text_column(row: Mapping[str, Any], name: str, where: str, *, wanted: str = "a text") -> str:
    """Return a row's value in a column that must hold a text which is not empty.

    Raises:
        UserError: There is no such column, or it holds something else.
    """
    value = column(row, name, where, wanted=wanted)
    if not isinstance(value, str) or not value.strip():
        raise wrong(name, value, where, wanted=wanted)
    return value


def wrong(name: str, value: Any, where: str, *, wanted: str) -> UserError:
    """Return the error for a column that holds something unusable."""
    return UserError(f"{where}: column '{name}' is {shown(value)}; wanted: {wanted}")


def shown(value: Any) -> str:
    """Format a value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
