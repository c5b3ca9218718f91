"""Making of environments from what the configuration names: a class, an adapter, or tools."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from shardes.environments.adapters.registry import ADAPTERS, HARNESSES
from shardes.environments.base import Environment, EnvironmentSpec
from shardes.rewards.importing import import_functions
from shardes.rewards.signature import Signature


class EnvironmentFactory(Protocol):
    """Maker of the environments of a task.

    Attributes:
        columns: Columns of a row that ``reset`` looks at; None: all.
        required: Columns that ``reset`` cannot do without.
    """

    columns: list[str] | None
    required: list[str]

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Return JSON schemas of the tools that the model may call; None: no tools.

        Raises:
            ValueError: There is none for a tool.
        """

    def make(self) -> Environment:
        """Return the environment of a new episode."""


@dataclass
class PlainFactory:
    """Maker of environments by a class, or by any function that returns one."""

    make: Callable[[], Environment]
    tools: list[dict[str, Any]] | None = None
    columns: list[str] | None = None
    required: list[str] = field(default_factory=list)


def make_factory(spec: EnvironmentSpec) -> EnvironmentFactory:
    """Import what a task names, and return the maker of its environments.

    An adapter's package and what tools need are imported only where they are asked for.

    Raises:
        ValueError: There is no such class, adapter or tool, it cannot be imported, or it is no environment.
    """
    if not spec.reference or spec.tools:
        return _make_tool_factory(spec)
    prefix, _, name = spec.reference.partition(":")
    if prefix in ADAPTERS:
        return _make_adapted(spec, ADAPTERS[prefix], name)
    made = _import(spec.reference)
    if inspect.isclass(made):
        return _make_tool_factory(spec) if _has_tools(made) else _make_of_class(spec, made)
    return _make_of_function(spec, made)


def _make_tool_factory(spec: EnvironmentSpec) -> EnvironmentFactory:
    from shardes.environments.tools import make_tool_factory

    return make_tool_factory(spec)


def _import(reference: str) -> Callable[..., Any]:
    adapters = sorted([*ADAPTERS, *HARNESSES])
    if ":" not in reference:
        raise ValueError(
            f"{reference!r} is no environment; give package.module:Class, path/to/file.py:Class or "
            f"ADAPTER:NAME, with one of the adapters {', '.join(adapters)}"
        )
    try:
        return import_functions([reference], kind="class")[0]
    except ValueError as error:
        near = difflib.get_close_matches(reference.partition(":")[0], adapters, n=1)
        hint = f"; or is the adapter {near[0]!r} meant?" if near else ""
        raise ValueError(f"{error}{hint}") from None


def _make_adapted(spec: EnvironmentSpec, reference: str, name: str) -> EnvironmentFactory:
    adapt = import_functions([reference])[0]
    make = adapt(name, dict(spec.arguments))
    kind = getattr(make, "func", make)  # as functools.partial has it
    found = PlainFactory(make)
    if inspect.isclass(kind):
        _inspect(found, kind, spec.reference)
    return found


def _has_tools(kind: type) -> bool:
    """Return True for a class as TRL has it: with methods of other names than ``step``, which are tools."""
    if hasattr(kind, "step"):
        return False
    methods = {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
    return bool(methods - {"reset", "close", "get_reward"})


def _make_of_class(spec: EnvironmentSpec, kind: type) -> EnvironmentFactory:
    _check_methods(kind, spec.reference)
    _check_arguments(kind, spec.arguments, spec.reference)
    found = PlainFactory(functools.partial(kind, **spec.arguments))
    _inspect(found, kind, spec.reference)
    return found


def _make_of_function(spec: EnvironmentSpec, function: Callable[..., Any]) -> EnvironmentFactory:
    """Return the factory of a function's environments, of which nothing is known until it has made one."""
    _check_arguments(function, spec.arguments, spec.reference)
    make = functools.partial(function, **spec.arguments)
    try:
        first = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec.reference} raised {type(error).__name__}: {error}") from None
    if _has_tools(type(first)):
        return _make_tool_factory(spec)
    _check_methods(first, f"what {spec.reference} returns, {type(first).__name__},")
    unused = [first]
    found = PlainFactory(lambda: unused.pop() if unused else make())
    _inspect(found, first, spec.reference)
    return found


def _check_methods(owner: Any, subject: str) -> None:
    missing = [name for name in ("reset", "step") if not callable(getattr(owner, name, None))]
    if missing:
        raise ValueError(
            f"{subject} has no method {' and no method '.join(missing)}; an environment is a class with "
            "reset(**row) -> text or messages and step(completion) -> (observation, reward, done)"
        )


def _check_arguments(made: Callable[..., Any], arguments: Mapping[str, Any], reference: str) -> None:
    """Refuse arguments that the class does not take, before it is called for the first episode."""
    try:
        signature = inspect.signature(made)
    except ValueError:  # it cannot be inspected
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"task.environment_arguments: {reference}: {error}; it takes {signature}") from None


def _inspect(found: PlainFactory, owner: Any, reference: str) -> None:
    """Note the columns that ``reset`` takes; ``owner`` is a class, or an object of it."""
    reset = owner.reset
    is_unbound = inspect.isclass(owner) and inspect.isfunction(inspect.getattr_static(owner, "reset"))
    try:
        parameters = list(inspect.signature(reset).parameters.values())[int(is_unbound) :]
    except (TypeError, ValueError):
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if nameless := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        raise ValueError(f"{reference}: reset takes {nameless[0]!r} by position; columns are passed by name")
    found.required = [p.name for p in named if p.default is p.empty]
    looks_at_any = Signature.of(getattr(reset, "__func__", reset)).looks_at_any
    found.columns = None if looks_at_any else [p.name for p in named]


def missing_columns(row: Mapping[str, Any], required: Collection[str]) -> str | None:
    """Return why a row lacks what ``reset`` needs; None if it has all of it."""
    missing = [name for name in required if name not in row]
    if not missing:
        return None
    return f"the row has no column {missing[0]!r}, which reset needs; it has {', '.join(row) or 'none'}"
