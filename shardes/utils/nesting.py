"""Depth of values that contain others, which what copies them by recursion can do only so much of."""

from typing import Any

# Python's own limit is a thousand calls, and some copies take several for each level.
MAX_DEPTH = 50


def is_deep(value: Any) -> bool:
    """Return whether lists and dicts contain each other on more than ``MAX_DEPTH`` levels."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    return bool(level)
