"""Parts that adapters share: their messages, and arguments that rows replace."""

import difflib
import importlib
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any


def load_package(module: str, *, adapter: str, extra: str) -> ModuleType:
    """Import a package that an adapter needs.

    Raises:
        ValueError: It is missing, or cannot be imported; the message says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"The adapter {adapter} needs the package {module.partition('.')[0]}, which cannot be imported "
            f"({error}): pip install 'shardes[{extra}]'"
        ) from error


def check_known(name: str, known: Collection[str], *, kind: str) -> None:
    """Raise ValueError, with the nearest known names, for a name that is none of them.

    Args:
        name: The name to look for.
        known: All names there are.
        kind: The thing that is named, as in "data set of reasoning_gym".
    """
    if name in known:
        return
    by_lower_case = {other.lower(): other for other in sorted(known)}
    # A name without its version, such as FrozenLake of FrozenLake-v1, is nearest to those that begin with it.
    begin = [other for other in sorted(known) if name and other.lower().startswith(name.lower())][:3]
    near = [by_lower_case[match] for match in difflib.get_close_matches(name.lower(), by_lower_case)]
    nearest = list(dict.fromkeys(begin + near))[:3]
    listed = sorted(known)
    hint = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(listed[:20])}"
    more = f" and {len(listed) - 20} more" if not nearest and len(listed) > 20 else ""
    raise ValueError(f"Unknown {kind}: {name!r}; {hint}{more}")


def check_choice(value: Any, choices: Collection[str], *, argument: str) -> None:
    """Raise ValueError for an argument of an adapter that is none of a few strings."""
    if value not in choices:
        raise ValueError(
            f"The environment's argument {argument} is {value!r}; it has to be one of {', '.join(choices)}"
        )


def take_seed(arguments: dict[str, Any]) -> int:
    """Remove the argument ``seed`` and return it, 0 if it is not given; a row's index is added to it.

    Raises:
        ValueError: It is no whole number of at least 0.
    """
    seed = arguments.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"The environment's argument seed is {seed!r}; it has to be a whole number from 0")
    return seed


def check_index(index: Any) -> int:
    """Return the column ``index`` of a row as an int.

    Raises:
        ValueError: It is no whole number of at least 0.
    """
    if isinstance(index, bool) or not isinstance(index, int) or index < 0:
        raise ValueError(f"The row's column index is {index!r}; it has to be a whole number from 0")
    return index


def override(arguments: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments, with the values of a row's columns for those whose names it has."""
    return {name: row.get(name, value) for name, value in arguments.items()}
