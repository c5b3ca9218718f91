"""Parts of messages: exceptions and names, shortened."""

from collections.abc import Sequence


def listed(names: Sequence[str], *, most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def one_line(error: BaseException, *, most: int | None = 300) -> str:
    """Return an exception's text as one line of at most so many characters, or its type if there is none."""
    return " ".join(str(error).split())[:most] or type(error).__name__
