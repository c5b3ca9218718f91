"""Environments made of tools: functions, or a class whose public methods the model calls, as in TRL.

Nothing here imports torch: environments run in processes of their own, which have to start quickly.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from shardes.environments.base import EnvironmentSpec, Message, Observation
from shardes.environments.tool_schemas import Tool, check_names, schemas
from shardes.rewards.importing import import_functions

ERROR_KINDS = ("unknown_tool", "bad_arguments", "raised", "unparsable")
"""Mistakes of calls: no such tool; arguments that are missing, unknown or of another type; an exception in
the tool; and text that is no call."""

_NOT_TOOLS = frozenset({"reset", "get_reward", "close"})
# The message that TRL takes for a row without a prompt.
_EMPTY_PROMPT = [{"role": "user", "content": ""}]


def make_tool_factory(spec: EnvironmentSpec) -> "ToolFactory":
    """Return the maker of environments of a class without ``step``, of functions, or of both.

    Args:
        spec: ``reference`` names the class, or is empty; ``arguments`` are the class's; ``tools`` names
            functions.

    Raises:
        ValueError: One of them cannot be imported or cannot be a tool, two have the same name, there are
            none, or the class has no ``reset``.
    """
    references = [*([spec.reference] if spec.reference else []), *spec.tools]
    named = f"task.tools: {', '.join(spec.tools)}"
    where = f"task.environment: {spec.reference}" if spec.reference else named
    found = import_functions(references)
    functions = found[len(found) - len(spec.tools) :]
    source = found[0] if spec.reference else None
    try:
        return ToolFactory(source, functions, arguments=spec.arguments, where=where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


class ToolFactory:
    """Maker of environments whose tools a model calls until it answers without a call.

    Args:
        source: A class of TRL's ``environment_factory``, or a function that returns an object of one; None:
            there are functions only.
        functions: Functions that the model may call, besides the class's public methods.
        arguments: Arguments of the class.
        where: Names them in messages about schemas.

    Attributes:
        columns: Columns that ``reset`` takes; None: all of them.
        required: Columns that it needs.

    Raises:
        ValueError: See ``make_tool_factory``.
    """

    def __init__(
        self,
        source: Callable[..., Any] | None,
        functions: Sequence[Callable[..., Any]],
        *,
        arguments: Mapping[str, Any] | None = None,
        where: str = "task.tools",
    ) -> None:
        self._source = source
        self._where = where
        self._arguments = dict(arguments or {})
        self._functions = [Tool(function) for function in functions]
        if source is None and self._arguments:
            raise ValueError("there are tools only, and no class that task.environment_arguments are of")
        probe = None if source is None else self._probe()
        if probe is not None:
            _check_class(probe)
        self._tools = [*self._functions, *map(Tool, _methods(probe))]
        check_names(self._tools)
        if not self._tools:
            raise ValueError(
                "it has neither step nor a public method besides reset and get_reward, so that a model can "
                "do nothing in it"
            )
        names, required, takes_any = _parameters_of_reset(probe)
        self.columns: list[str] | None = None if takes_any else sorted({*names, "prompt"})
        self.required: list[str] = ["prompt"] if probe is None else required
        self._given = None if takes_any else frozenset(names)
        _close(probe)

    @functools.cached_property
    def tools(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools: the functions first, then the methods by their names.

        Raises:
            ValueError: A docstring does not describe an argument, or there is no schema for a type hint.
        """
        try:
            return schemas(self._tools)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from None

    def make(self) -> "ToolEnvironment":
        """Return the environment of another episode."""
        if self._source is None:
            return ToolEnvironment(None, self._tools, columns=None)
        inner = self._instance()
        tools = [*self._functions, *map(Tool, _methods(inner))]
        return ToolEnvironment(inner, tools, columns=self._given)

    def _probe(self) -> Any:
        """Return an object to be looked at.

        Raises:
            ValueError: The class cannot be called with its arguments, or fails.
        """
        try:
            return self._instance()
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"making an object of it with task.environment_arguments {self._arguments} fails "
                f"({type(error).__name__}: {error})"
            ) from None

    def _instance(self) -> Any:
        assert self._source is not None
        return self._source(**self._arguments)


class ToolEnvironment:
    """One episode, in which the model calls tools, and which its first answer without a call ends.

    Methods return coroutines if a tool, or a method of the class, is one.

    Args:
        inner: The object whose methods are tools; None: there are functions only.
        tools: What the model may call.
        columns: Columns that the object's ``reset`` takes; None: all of them.
    """

    def __init__(self, inner: Any, tools: Sequence[Tool], *, columns: frozenset[str] | None) -> None:
        self._inner = inner
        self._tools = {tool.name: tool for tool in tools}
        self._columns = columns
        self._num_calls = 0
        self._num_errors = dict.fromkeys(ERROR_KINDS, 0)
        methods = [getattr(inner, name, None) for name in ("reset", "get_reward", "close")]
        self._is_async = any(map(inspect.iscoroutinefunction, methods)) or any(
            tool.is_async for tool in tools
        )

    @property
    def numbers(self) -> dict[str, float]:
        """Return the calls so far, and how many of them were mistakes, in all and by their kind.

        Numbers of the object itself, a dict of this name, are added.
        """
        own = getattr(self._inner, "numbers", None)
        counts = {f"tool_errors_{kind}": float(count) for kind, count in self._num_errors.items()}
        total = float(sum(self._num_errors.values()))
        given = own if isinstance(own, dict) else {}
        return {**given, "tool_calls": float(self._num_calls), "tool_errors": total, **counts}

    def reset(self, **row: Any) -> Any:
        """Begin the episode of a row: its prompt, with what the object's ``reset`` returns at the end of it.

        Returns:
            Text or messages; or a coroutine of them.
        """
        return self._finished(self._reset(row))

    def step(self, completion: str, *, message: Message | None = None) -> Any:
        """Call the tools that the model asks for, in order; there is no next step if it asks for none.

        Args:
            completion: The model's answer.
            message: The same with ``tool_calls``, or with ``tool_call_error`` where a call is none.

        Returns:
            The tools' messages, the reward, and whether the episode is over; or a coroutine of them.
        """
        return self._finished(self._step(message or {}))

    def finish(self) -> Any:
        """Return the reward of an episode that a limit ends; or a coroutine of it."""
        return self._finished(self._reward())

    def close(self) -> Any:
        """Free what the object holds, if it has a ``close``."""
        return self._finished(_awaited(getattr(self._inner, "close", lambda: None)()))

    def _finished(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._is_async:
            return coroutine
        try:
            coroutine.send(None)
        except StopIteration as stop:
            return stop.value
        finally:
            coroutine.close()
        raise RuntimeError("a tool that is no coroutine function has returned an awaitable that waits")

    async def _reset(self, row: Mapping[str, Any]) -> Observation:
        if self._inner is None:
            return _prompt(row["prompt"])
        taken = row if self._columns is None else {key: row[key] for key in row if key in self._columns}
        said = await _awaited(self._inner.reset(**taken))
        if said is None and row.get("prompt") is None:
            raise ValueError(
                "the row has no column prompt, and reset returns None; there is nothing to ask the model"
            )
        return _joined(_prompt(row.get("prompt")), said)

    async def _step(self, message: Message) -> tuple[Observation, float, bool]:
        if (problem := message.get("tool_call_error")) is not None:
            self._num_calls += 1
            # No message of a tool: many templates want these to follow a call.
            return [{"role": "user", "content": self._error("unparsable", problem)}], 0.0, False
        calls = message.get("tool_calls") or []
        if not calls:
            return "", await self._reward(), True
        return [await self._answer(call) for call in calls], 0.0, False

    async def _answer(self, call: Mapping[str, Any]) -> Message:
        """Return what a call returns, as a message of the tool."""
        self._num_calls += 1
        function = call.get("function") or {}
        name = str(function.get("name") or "")
        message: Message = {"role": "tool", "name": name}
        if call.get("id") is not None:
            message["tool_call_id"] = call["id"]
        return message | {"content": await self._result(name, function.get("arguments"))}

    async def _result(self, name: str, arguments: Any) -> Any:
        tool = self._tools.get(name)
        if tool is None:
            near = difflib.get_close_matches(name, self._tools, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"the tools are {', '.join(self._tools)}."
            return self._error("unknown_tool", f"Tool {name} not found; {known}")
        if not isinstance(arguments, dict):
            return self._error("bad_arguments", f"{name}: the arguments are no JSON object")
        if (problem := tool.problem(arguments)) is not None:
            return self._error("bad_arguments", problem)
        try:
            result = await _awaited(tool.function(**arguments))
            return result if _is_parts(result) else str(result)
        except MemoryError:
            raise
        except Exception as error:  # the model sees whatever its call has raised
            return self._error("raised", str(error) or type(error).__name__)

    def _error(self, kind: str, problem: str) -> str:
        """Count a mistake, and return what the model is told of it, as TRL has it."""
        self._num_errors[kind] += 1
        return str({"error": problem})

    async def _reward(self) -> float:
        get_reward = getattr(self._inner, "get_reward", None)
        if get_reward is None:
            return 0.0
        reward = await _awaited(get_reward())
        try:
            return float(reward)
        except (TypeError, ValueError):
            raise ValueError(f"get_reward returns {reward!r}; wanted a number") from None


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _check_class(inner: Any) -> None:
    kind = type(inner)
    if callable(getattr(kind, "step", None)):
        raise ValueError(
            f"{kind.__name__} has a step, and so takes the model's answers as they are, without task.tools; "
            "remove the one or the other"
        )
    if not callable(getattr(kind, "reset", None)):
        raise ValueError(f"{kind.__name__} has no reset; wanted reset(**row), which returns a text or None")


def _methods(inner: Any) -> list[Callable[..., Any]]:
    """Return the tools of an object, by name: its class's public functions, as TRL finds them."""
    if inner is None:
        return []
    return [
        getattr(inner, name)
        for name, _ in inspect.getmembers(type(inner), predicate=inspect.isfunction)
        if name not in _NOT_TOOLS and not name.startswith("_")
    ]


def _parameters_of_reset(inner: Any) -> tuple[list[str], list[str], bool]:
    """Return the columns that a ``reset`` names, those of them that it needs, and whether it takes any."""
    if inner is None:
        return ["prompt"], ["prompt"], False
    parameters = inspect.signature(inner.reset).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    return [p.name for p in named], required, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _close(probe: Any) -> None:
    close = getattr(probe, "close", None)
    if callable(close) and not inspect.iscoroutinefunction(close):
        close()


def _prompt(prompt: Any) -> Observation:
    if prompt is None:
        return [dict(message) for message in _EMPTY_PROMPT]
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _joined(prompt: Observation, said: Any) -> Observation:
    """Return a prompt with a text, or parts of a message, at the end of its last message; or with messages.

    Raises:
        ValueError: It is none of them.
    """
    if said is None:
        return prompt
    if isinstance(said, list) and said and all(isinstance(each, dict) and "role" in each for each in said):
        earlier = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return said if earlier == _EMPTY_PROMPT else [*earlier, *said]
    if not (isinstance(said, str) or _is_parts(said)):
        raise ValueError(f"reset returns {type(said).__name__}; wanted a text, None, or messages")
    if isinstance(prompt, str):
        if isinstance(said, str):
            return prompt + said
        prompt = [{"role": "user", "content": prompt}]
    *earlier, last = prompt
    content = last.get("content") or ""
    if isinstance(said, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(said, str) and isinstance(content, list):
        said = [{"type": "text", "text": said}]
    return [*earlier, {**last, "content": content + said}]


def _is_parts(value: Any) -> bool:
    """Return whether a value is parts of a message, as templates of models that see images take them."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "type" in v for v in value)
