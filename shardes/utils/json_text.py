"""JSON in which no name of an object is lost because it is given twice."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or gives a name of an object twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {repeated!r} is given twice")
    return found
