"""Arguments that a reward function takes, and the columns that it looks at."""

import dis
import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Self

from shardes.tasks.base import RewardFunction

GIVEN = frozenset({"prompts", "completions", "completion_ids"})
"""Arguments that every call may have; a configuration cannot give them."""

# By these a function could look at arguments that it does not name.
_INTROSPECTION = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe", "stack"}


@dataclass(frozen=True)
class Signature:
    """Arguments that a reward function takes.

    Attributes:
        names: Names of its parameters.
        takes_any: True if it takes every column, whatever its name.
        looks_at_any: True unless it takes every column only to ignore those that it does not name.
    """

    names: frozenset[str]
    takes_any: bool
    looks_at_any: bool

    @classmethod
    def of(cls, function: RewardFunction) -> Self:
        """Inspect a function; one that cannot be inspected takes everything."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return cls(frozenset(), True, True)
        names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        return cls(names, rest is not None, rest is not None and _looks_at(function, rest))

    @property
    def columns(self) -> frozenset[str] | None:
        """Return the columns that a call needs; None: all of them."""
        return None if self.looks_at_any else self.names

    def check_arguments(self, arguments: Any) -> None:
        """Refuse arguments of the configuration that no call could have.

        Raises:
            ValueError: The function has no such parameter.
        """
        unknown = [] if self.takes_any else sorted(set(arguments) - self.names)
        if unknown:
            raise ValueError(
                f"arguments: the function has no parameter {unknown[0]!r}; it has "
                f"{', '.join(sorted(self.names)) or 'none'}"
            )


def _looks_at(function: RewardFunction, name: str) -> bool:
    """Return False if a function's code never reads a variable, as in TRL's signatures with ``**kwargs``."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return True
    code = function.__code__
    if name in code.co_cellvars or _INTROSPECTION & {*code.co_names, *code.co_freevars}:
        return True
    return any(name == used or (isinstance(used, tuple) and name in used) for used in _operands(function))


def _operands(function: FunctionType) -> list[Any]:
    return [instruction.argval for instruction in dis.get_instructions(function)]
