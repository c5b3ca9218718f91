"""Functions that a model may call: checked, and described as JSON schemas."""

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class Tool:
    """A function or a bound method that a model may call.

    Args:
        function: The function; maybe a coroutine function.

    Attributes:
        function: The function.
        name: Its name.
        is_async: Whether it is a coroutine function.

    Raises:
        ValueError: It has no docstring, or a parameter without a type hint or that no call can name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name: str = getattr(function, "__name__", type(function).__name__)
        self.is_async = inspect.iscoroutinefunction(function)
        remedy = "a tool needs a docstring that describes it and its arguments, and type hints"
        if not inspect.getdoc(function):
            raise ValueError(f"the tool {self.name} has no docstring; {remedy}")
        self._signature = inspect.signature(function)
        for parameter in self._signature.parameters.values():
            if parameter.annotation is parameter.empty:
                raise ValueError(
                    f"the argument {parameter} of the tool {self.name} has no type hint; {remedy}"
                )
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(
                    f"the tool {self.name} takes {parameter}, which no call can give by its name; give each "
                    "argument a name"
                )
        try:
            self._hints = get_type_hints(function)
        except Exception as error:  # hints are expressions, and raise whatever these do
            raise ValueError(
                f"the type hints of the tool {self.name} cannot be read ({type(error).__name__}: {error})"
            ) from None
        self._adapters: dict[str, TypeAdapter[Any] | None] = {}

    def problem(self, arguments: Mapping[str, Any]) -> str | None:
        """Return what is wrong with the arguments of a call, for the model; None if nothing is.

        Values of JSON are compared with the type hints, and are not converted: ``"3"`` is no integer.
        """
        try:
            self._signature.bind(**arguments)
        except TypeError as error:
            names = ", ".join(self._signature.parameters) or "nothing"
            return f"{self.name}: {error}; it takes {names}"
        for name, value in arguments.items():
            if (problem := self._problem_of(name, value)) is not None:
                return f"{self.name}: {name}: {problem}, got {json.dumps(value, default=str)}"
        return None

    def _problem_of(self, name: str, value: Any) -> str | None:
        from pydantic import ValidationError

        adapter = self._adapter(name)
        if adapter is None:
            return None
        try:
            # As JSON, in which enumerations are their values, and tuples are lists.
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            return str(error.errors(include_url=False)[0]["msg"])
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def _adapter(self, name: str) -> "TypeAdapter[Any] | None":
        from pydantic import PydanticUserError, TypeAdapter

        if name not in self._adapters:
            try:
                self._adapters[name] = TypeAdapter(self._hints.get(name, Any))
            except PydanticUserError:  # a type that pydantic knows nothing of
                self._adapters[name] = None
        return self._adapters[name]


def check_names(tools: Sequence[Tool]) -> None:
    """Refuse two tools of the same name.

    Raises:
        ValueError: There are two.
    """
    names = [tool.name for tool in tools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"there are {names.count(twice[0])} tools of the name {twice[0]!r}; rename them, since the model "
            "calls a tool by its name"
        )


def schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools' JSON schemas, as transformers makes them for chat templates.

    Raises:
        ValueError: A docstring does not describe an argument, or there is no schema for a type hint.
    """
    return [_schema(tool) for tool in tools]


def _schema(tool: Tool) -> dict[str, Any]:
    from transformers.utils import chat_template_utils

    # Processes of environments do without torch. transformers has no argument for it, but imports it to know
    # a hint of one of its types.
    original = chat_template_utils.is_torch_available
    chat_template_utils.is_torch_available = lambda: "torch" in sys.modules
    try:
        schema: dict[str, Any] = chat_template_utils.get_json_schema(tool.function)
    except (
        chat_template_utils.DocstringParsingException,
        chat_template_utils.TypeHintParsingException,
        ValueError,
    ) as error:
        # The rest advises to pass a schema in place of the function.
        problem = " ".join(map(str, error.args)).partition(" If you need")[0]
        raise ValueError(f"the tool {tool.name}: {problem}") from None
    finally:
        chat_template_utils.is_torch_available = original
    return schema
